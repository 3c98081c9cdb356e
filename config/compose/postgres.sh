#!/usr/bin/env bash
# What the PostgreSQL of docker-compose.yml runs once, when its volume is empty: the broker's login, hardening, and two
# databases to try things on. SQL is the folder of the shipped statements, BROKER_PASSWORD_FILE holds the broker's password.
set -euo pipefail

run() { psql -X -q -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" "$@"; }

run -d postgres -v broker=countersign -f "$SQL/10-broker-direct.sql"
run -d postgres <<'EOS'
\set password `cat "$BROKER_PASSWORD_FILE"`
ALTER ROLE countersign PASSWORD :'password';
CREATE DATABASE app;
CREATE DATABASE sandbox;
EOS
for database in app sandbox; do
  run -d "$database" -v broker=countersign -v group=lease_conn -v leases=on -f "$SQL/00-hardening.sql"
done
for database in postgres template1; do
  run -d "$database" -v broker=countersign -v group=lease_conn -v leases=off -f "$SQL/00-hardening.sql"
done

run -d app <<'EOS'
CREATE TABLE invoices (id int PRIMARY KEY, cents int NOT NULL);
INSERT INTO invoices VALUES (1, 12000), (2, 4550);
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL);
INSERT INTO customers VALUES (1, 'Ada'), (2, 'Grace');
CREATE ROLE app_invoices_read NOLOGIN;
CREATE ROLE app_invoices_write NOLOGIN;
CREATE ROLE app_invoices_delete NOLOGIN;
CREATE ROLE app_customers_read NOLOGIN;
CREATE ROLE app_customers_write NOLOGIN;
CREATE ROLE app_customers_delete NOLOGIN;
GRANT SELECT ON invoices TO app_invoices_read;
GRANT SELECT, INSERT, UPDATE ON invoices TO app_invoices_write;
GRANT SELECT, DELETE ON invoices TO app_invoices_delete;
GRANT SELECT ON customers TO app_customers_read;
GRANT SELECT, INSERT, UPDATE ON customers TO app_customers_write;
GRANT SELECT, DELETE ON customers TO app_customers_delete;
EOS
run -d sandbox <<'EOS'
CREATE TABLE notes (id int PRIMARY KEY, body text NOT NULL);
INSERT INTO notes VALUES (1, 'nothing here is real');
CREATE ROLE sandbox_read NOLOGIN;
GRANT SELECT ON notes TO sandbox_read;
EOS
