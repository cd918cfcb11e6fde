#!/usr/bin/env python3
"""Run the AWS steps of README.md against moto, a program that imitates AWS.

usage: tests/check_aws.py [README]

The blocks that begin with "# CloudShell" run in bash, with the real aws command.
It sends everything to moto's server on a loopback port, and nothing to AWS.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent
VENV = TESTS / ".venv" / "aws"
REQUIREMENTS = ["moto>=5.1,<6", "flask>=3,<4", "flask-cors>=5,<7", "awscli>=1.44,<2"]
PASSWORD = """it's $HOME "quoted" `pwd` \\ # é"""  # harder than those that moto makes
PLACEHOLDER = "i-0123456789abcdef0"

# moto answers these with an error 500. Only their options and --query are checked.
LACKS = {
    "create-serverless-cache",
    "describe-serverless-caches",
    "delete-serverless-cache",
    "create-cache-parameter-group",
    "modify-cache-parameter-group",
    "delete-cache-parameter-group",
    "delete-cache-subnet-group",
}
# What is left after Step 5. moto keeps a deleted cluster, and all cache subnet groups.
LEFT = {
    "elasticache describe-replication-groups --query ReplicationGroups[].Status": "deleting",
    "elasticache describe-cache-subnet-groups --query CacheSubnetGroups[].CacheSubnetGroupName": "elc-tutorial",
    "rds describe-db-instances --query DBInstances": "",
    "rds describe-db-subnet-groups --query DBSubnetGroups": "",
    "rds describe-db-snapshots --query DBSnapshots": "",
    "secretsmanager list-secrets --query SecretList": "",
    "ec2 describe-security-groups --filters Name=group-name,Values=elc-tutorial* --query SecurityGroups": "",
}
# Before a --query: the result as it is while AWS creates the servers.
CREATING = """`{"ReplicationGroups": [{"Status": "creating"}], "DBInstances": [{}],
"ServerlessCaches": [{"Status": "creating"}]}` | """


def expect(condition, message):
    if not condition:
        sys.exit(f"check_aws: {message}")


def aws(*words):
    """Run an aws command against moto."""
    command = [VENV / "bin" / "aws", "--endpoint-url", os.environ["MOTO"], *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stand_in(words):
    """What `aws` does inside the blocks: run it, log it, and print what it prints."""
    sample = ["--generate-cli-skeleton", "output"]  # a result made up from AWS's model
    real = list(words)
    if "CREATING" in os.environ and "--query" in real:
        real[real.index("--query") + 1] = CREATING + real[real.index("--query") + 1]
    waits = words[1] == "wait"  # It would sleep, so only its options are checked.
    done = aws(*real, *(sample if waits else []))
    lacks = "500 Internal Server Error" in done.stderr
    if lacks:
        done = aws(*real, *sample)
    # The last line says it. Above it aws prints how it is used.
    error = (
        (done.stderr.strip() or "failed").splitlines()[-1] if done.returncode else ""
    )
    with open(os.environ["LOG"], "a") as log:
        log.write(json.dumps([words, lacks, error]) + "\n")
    print("" if waits else done.stdout, end="")
    return done.returncode


def paste(blocks, allowed="no error", **env):
    """Run the blocks in a new bash, and return what they print."""
    log = Path(os.environ["LOG"])
    start = len(log.read_text())
    itself = shlex.join([sys.executable, __file__, "--aws"])
    script = "\n".join(["set -u", f'aws() {{ {itself} "$@"; }}', *blocks])
    bash = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    # An error of moto names its code. One of aws itself, as of an option, does not.
    pattern = re.compile(rf"An error occurred \([\w.]*({allowed})\w*\)")
    for words, _, error in map(json.loads, log.read_text()[start:].splitlines()):
        command = "aws " + shlex.join(words)
        expect(not {"", "None"} & set(words), f"a variable is empty: {command}")
        expect(not error or pattern.match(error), f"{command}\n{error}")
    printed = bash.stdout + bash.stderr
    expect(not bash.stderr and "None" not in printed, f"a block printed:\n{printed}")
    return printed


def check_settings(printed, password):
    """The lines to copy must set the variables, whatever the password contains."""
    lines = [line for line in printed.splitlines() if line.startswith("export ")]
    serverless, *lines = lines or [""]
    url = "export REDIS_URL=rediss://Address:6379/0"
    expect(serverless == url, f"the serverless cache has {serverless}")
    names = ["REDIS_URL", "DB_HOST", "DB_USER", "DB_NAME", "DB_PASS"]
    show = " ".join(["printf '%s\\n'", *(f'"${name}"' for name in names)])
    bash = ["bash", "-uc", "\n".join([*lines, show])]
    done = subprocess.run(bash, env={}, capture_output=True, text=True, check=False)
    host = r"elc-tutorial\.[\w.-]+\.amazonaws\.com"
    pattern = rf"rediss://master\.{host}:6379/0\n{host}\nadmin\ntutorial\n"
    usable = re.fullmatch(pattern + re.escape(password) + "\n", done.stdout)
    settings = "\n".join([*lines, done.stdout, done.stderr])
    expect(usable, f"these lines do not set {', '.join(names)}:\n{settings}")


def check(create, clean, shown):
    printed = paste(clean, "NotFound")  # Step 5 is harmless if nothing was created.
    expect(printed.endswith(shown), f"on an empty account Step 5 prints:\n{printed}")

    (lookup,) = [block for block in create if PLACEHOLDER in block]
    printed = paste([lookup], "NotFound")
    expect(printed.startswith("Not found: "), f"for a wrong instance id:\n{printed}")
    group = ["--group-name", "app", "--description", "app", "--query", "GroupId"]
    group = json.loads(aws("ec2", "create-security-group", *group).stdout)
    run = ["--image-id", "ami-12c6146b", "--security-group-ids", group]
    instance = aws("ec2", "run-instances", *run, "--query", "Instances[0].InstanceId")
    create = [
        block.replace(PLACEHOLDER, json.loads(instance.stdout)) for block in create
    ]

    check_settings(paste(create), "P@55w0rd!")
    # AWS changes the password. Then a new session runs all blocks again.
    secret = json.loads(aws("secretsmanager", "list-secrets").stdout)["SecretList"][0]
    value = ["--secret-id", secret["ARN"], "--secret-string"]
    value += [json.dumps({"password": PASSWORD})]
    aws("secretsmanager", "put-secret-value", *value)
    check_settings(paste(create, "Duplicate|AlreadyExists"), PASSWORD)

    for block in create:
        if re.search("export (REDIS|DB)_", block):
            printed = paste([block], CREATING="1")
            ready = " is not ready: " not in printed or "export" in printed
            expect(not ready, f"while AWS creates the servers:\n{printed}")

    printed = paste(clean)
    expect(printed.endswith("Redis cluster\tdeleting\n"), f"Step 5 prints:\n{printed}")
    for command, expected in LEFT.items():
        done = aws(*command.split(), "--output", "text")
        left = done.stdout.strip() + done.stderr
        expect(left == expected, f"left after Step 5: {command}:\n{left}")


def check_names(create, clean):
    """Step 5 deletes what the steps create, also where moto cannot tell."""
    pattern = r"aws (\S+) {}-(?!security-group)(\S+) --\S+ (\S+)"
    created = set(re.findall(pattern.format("create"), "".join(create)))
    deleted = set(re.findall(pattern.format("delete"), "".join(clean)))
    expect(created == deleted, f"created or deleted only: {created ^ deleted}")
    expect({name for *_, name in created} == {"elc-tutorial"}, f"names: {created}")


@contextmanager
def moto(folder):
    """Run moto's server on a free port, and stop it in every case."""
    path = Path(folder) / "moto.log"
    command = [VENV / "bin" / "moto_server", "-H", "127.0.0.1", "-p", "0"]
    with open(path, "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not (address := re.search(r"http://127.0.0.1:\d+", path.read_text())):
            expect(server.poll() is None, f"moto has ended:\n{path.read_text()}")
            time.sleep(0.1)
        os.environ["MOTO"] = address[0]
        yield
    finally:
        server.terminate()
        server.wait()


def prepare():
    """Make the virtual environment unless it is there, and hide any real account."""
    stamp, wanted = VENV / "stamp", f"{sys.version} {VENV} {REQUIREMENTS}"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("check_aws: installing moto and awscli", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [VENV / "bin" / "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        AWS_MAX_ATTEMPTS="1",
        NO_PROXY="127.0.0.1",
        PYTHONUTF8="1",
    )


def main():
    path = Path(sys.argv[1]) if sys.argv[1:] else TESTS.parent / "README.md"
    parts = re.split(r"(?m)^## Step 5.*", path.read_text(encoding="utf-8"))
    expect(len(parts) == 2, f"{path} has no Step 5, or two")
    blocks = [re.findall(r"(?ms)^```sh\n(.*?)^```$", part) for part in parts]
    create, clean = (
        [b for b in part if b.startswith("# CloudShell\n")] for part in blocks
    )
    shown = re.search(r"(?ms)^```text\n(.*?)^```$", parts[1])
    expect(create and clean and shown, f"{path} has no blocks to run")
    for block in blocks[0] + blocks[1]:
        other = re.search(r"\baws [a-z]", block) and block not in create + clean
        expect(not other, f"this block does not begin with # CloudShell:\n{block}")
    check_names(create, clean)
    prepare()
    with TemporaryDirectory() as folder, moto(folder):
        log = Path(folder) / "aws.log"
        log.touch()
        os.environ["LOG"] = str(log)
        check(create, clean, shown[1])
        calls = [json.loads(line) for line in log.read_text().splitlines()]
    lacks = [words[1] for words, lack, _ in calls if lack]
    # The moto for Python 3.9 lacks this one too.
    gaps = set(lacks) - {"modify-replication-group"} ^ LACKS
    expect(not gaps, f"moto has other gaps now: {gaps}")
    print(
        f"check_aws: {len(create + clean)} blocks passed with {len(calls)} aws commands. "
        f"moto lacks {len(lacks)} of them: {', '.join(sorted(set(lacks)))}. "
        "It keeps a deleted cluster and its subnet group."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--aws"]:
        sys.exit(stand_in(sys.argv[2:]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
