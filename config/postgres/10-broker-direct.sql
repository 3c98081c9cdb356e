-- The broker's login with CREATEROLE: the simple set-up (`setup = "direct"`). Run once for each cluster, as a superuser.
--
--   psql -v broker=countersign -f 10-broker-direct.sql        then   \password countersign
--
-- Know what it means: on PostgreSQL 15 CREATEROLE is nearly superuser. Whoever takes over the broker's login can grant itself any
-- role that is no superuser, pg_execute_server_program among them. 11-broker-functions.sql is the stricter set-up.
\set ON_ERROR_STOP on
\if :{?broker} \else \set broker countersign \endif

SELECT format('CREATE ROLE %I LOGIN', :'broker') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'broker') \gexec
ALTER ROLE :"broker" LOGIN CREATEROLE NOSUPERUSER NOCREATEDB NOREPLICATION NOBYPASSRLS INHERIT;

-- PostgreSQL 16 and later: CREATEROLE reaches only what it has ADMIN on. For each group that the catalogue names, and lease_conn:
--   GRANT app_rw TO countersign WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
