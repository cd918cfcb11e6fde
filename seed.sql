-- The tutorial's data. It can be run again: nothing is changed, nothing is lost.
-- mysql -h endpoint -P 3306 -u admin -p < seed.sql

SET NAMES utf8mb4;

CREATE DATABASE IF NOT EXISTS tutorial CHARACTER SET utf8mb4;
USE tutorial;

CREATE TABLE IF NOT EXISTS planet (
  id INT UNSIGNED AUTO_INCREMENT,
  name VARCHAR(30),
  PRIMARY KEY (id)
) CHARACTER SET utf8mb4;

-- IGNORE skips the ids that are there already, renamed ones included.
INSERT IGNORE INTO planet (id, name) VALUES
  (1, 'Mercury'),
  (2, 'Venus'),
  (3, 'Earth'),
  (4, 'Mars'),
  (5, 'Jupiter'),
  (6, 'Saturn'),
  (7, 'Uranus'),
  (8, 'Neptune');

-- A table for exercises, without rows.
CREATE TABLE IF NOT EXISTS customer (
  id INT UNSIGNED AUTO_INCREMENT,
  name VARCHAR(50),
  email VARCHAR(50),
  discount DECIMAL(4, 2),
  since DATETIME,
  PRIMARY KEY (id)
) CHARACTER SET utf8mb4;
