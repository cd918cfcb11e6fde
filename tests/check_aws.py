#!/usr/bin/env python3
"""Run the AWS steps of README.md against moto, a program that imitates AWS.

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
# Scripts like aws do not start in a folder with a space.
PYTHON = [VENV / "bin" / "python", "-m"]
REQUIREMENTS = ["moto>=5.1,<6", "flask>=3,<4", "flask-cors>=5,<7", "awscli>=1.44,<2"]
PASSWORD = """it's $HOME "quoted" `pwd` \\ # é"""  # harder than those that moto makes
PLACEHOLDER = "i-0123456789abcdef0"

# moto answers these commands with an error 500. Only their options and --query are
# checked. The moto for Python 3.9 lacks modify-replication-group.
LACKS = "serverless-cache|cache-parameter-group|delete-cache-subnet|modify-replication"
# What is left after Step 5. moto keeps a deleted cluster, and all cache subnet groups.
LEFT = """
    deleting <- elasticache describe-replication-groups --query ReplicationGroups[].Status
    elc-tutorial <- elasticache describe-cache-subnet-groups --query CacheSubnetGroups[].CacheSubnetGroupName
    <- rds describe-db-instances --query DBInstances
    <- rds describe-db-subnet-groups --query DBSubnetGroups
    <- rds describe-db-snapshots --query DBSnapshots
    <- secretsmanager list-secrets --query SecretList
    <- ec2 describe-security-groups --filters Name=group-name,Values=elc-tutorial* --query SecurityGroups
"""
# Before a --query: the result as it is while AWS creates the servers.
CREATING = """`{"ReplicationGroups": [{"Status": "creating"}], "DBInstances": [{}],
"ServerlessCaches": [{"Status": "creating"}]}` | """


def expect(condition, message):
    if not condition:
        sys.exit(f"check_aws: {message}")


def run(command, **options):
    options.update(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return subprocess.run(command, check=False, **options)


def aws(*words):
    """Run an aws command against moto."""
    return run([*PYTHON, "awscli", "--endpoint-url", os.environ["MOTO"], *words])


def stand_in(words):
    """Run, log and print an aws command of a block."""
    real = list(words)
    if "CREATING" in os.environ and "--query" in real:
        real[real.index("--query") + 1] = CREATING + real[real.index("--query") + 1]
    sample = ["--generate-cli-skeleton", "output"]  # a result made up from AWS's model
    waits = words[1] == "wait"  # It would sleep, so only its options are checked.
    done = aws(*real, *(sample if waits else []))
    if re.search(LACKS, words[1]) and "500 Internal Server Error" in done.stderr:
        done = aws(*real, *sample)
    error = ""
    if done.returncode:  # the last line says why, after the usage of aws
        error = (done.stderr.strip() or "failed").splitlines()[-1]
    with open(os.environ["LOG"], "a") as log:
        log.write(json.dumps([words, error]) + "\n")
    print("" if waits else done.stdout, end="")
    return done.returncode


def paste(blocks, allowed="no error", **env):
    """Run the blocks in a new bash, and return what they print."""
    log = Path(os.environ["LOG"])
    log.write_text("")
    itself = shlex.join([sys.executable, __file__, "--aws"])
    script = "\n".join(["set -u", f'aws() {{ {itself} "$@"; }}', *blocks])
    bash = run(["bash", "-c", script], env={**os.environ, **env})
    # An error of moto names its code. One of aws itself, as of an option, does not.
    pattern = re.compile(rf"An error occurred \([\w.]*({allowed})\w*\)")
    for words, error in map(json.loads, log.read_text().splitlines()):
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
    show = r"printf '%s\n' $REDIS_URL $DB_HOST $DB_USER $DB_NAME " + '"$DB_PASS"'
    done = run(["bash", "-uc", "\n".join([*lines, show])], env={})
    host = r"elc-tutorial\.[\w.-]+\.amazonaws\.com"
    pattern = rf"rediss://master\.{host}:6379/0\n{host}\nadmin\ntutorial\n"
    usable = re.fullmatch(pattern + re.escape(password) + "\n", done.stdout)
    settings = "\n".join([*lines, done.stdout, done.stderr])
    expect(usable, f"these lines do not set all variables:\n{settings}")


def check(create, clean, shown):
    printed = paste(clean, "NotFound")  # Step 5 is harmless if nothing was created.
    expect(printed.endswith(shown), f"on an empty account Step 5 prints:\n{printed}")

    group = aws("ec2", "create-security-group", "--group-name=app", "--description=app")
    group = "--security-group-ids=" + json.loads(group.stdout)["GroupId"]
    instance = aws("ec2", "run-instances", "--image-id=ami-12c6146b", group)
    instance = json.loads(instance.stdout)["Instances"][0]["InstanceId"]
    create = [block.replace(PLACEHOLDER, instance) for block in create]
    check_settings(paste(create), "P@55w0rd!")

    # AWS changes the password. Then a new session runs all blocks again.
    secret = json.loads(aws("secretsmanager", "list-secrets").stdout)["SecretList"][0]
    new = ["--secret-id", secret["ARN"], "--secret-string"]
    new += [json.dumps({"password": PASSWORD})]
    aws("secretsmanager", "put-secret-value", *new)
    check_settings(paste(create, "Duplicate|AlreadyExists"), PASSWORD)

    for block in create:
        if re.search("export (REDIS|DB)_", block):
            printed = paste([block], CREATING="1")
            ready = " is not ready: " not in printed or "export" in printed
            expect(not ready, f"while AWS creates the servers:\n{printed}")

    printed = paste(clean)
    expect(printed.endswith("Redis cluster\tdeleting\n"), f"Step 5 prints:\n{printed}")
    for line in LEFT.strip().splitlines():
        expected, command = line.split("<- ")
        done = aws(*command.split(), "--output", "text")
        left = done.stdout.strip() + done.stderr
        expect(left == expected.strip(), f"left after Step 5: {command}:\n{left}")


@contextmanager
def moto(folder):
    """Run moto's server on a free port, and stop it in every case."""
    path = Path(folder) / "moto.log"
    command = [*PYTHON, "moto.server", "-H", "127.0.0.1", "-p", "0"]
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
        pip = [*PYTHON, "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=os.devnull,
        AWS_MAX_ATTEMPTS="1",
        NO_PROXY="127.0.0.1",
        PYTHONUTF8="1",
    )


def main():
    path = TESTS.parent / "README.md"
    steps, _, last_step = path.read_text(encoding="utf-8").partition(
        "<summary>Step 5 on AWS"
    )
    pattern = r"(?ms)^```sh\n# CloudShell\n(.*?)^```$"
    create, clean = re.findall(pattern, steps), re.findall(pattern, last_step)
    shown = re.search(r"(?ms)^```text\n(.*?)^```$", last_step)
    expect(create and clean and shown, f"{path} has no blocks to run")
    prepare()
    with TemporaryDirectory() as folder, moto(folder):
        os.environ["LOG"] = str(Path(folder) / "aws.log")
        check(create, clean, shown[1])
    print(f"check_aws: {len(create + clean)} blocks passed; moto lacks {LACKS}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--aws"]:
        sys.exit(stand_in(sys.argv[2:]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
