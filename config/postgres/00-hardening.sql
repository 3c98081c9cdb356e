-- Hardens one database for leases. Run it as a superuser in EVERY database of the cluster that accepts connections, also
-- those that no lease is meant for (postgres, template1): PUBLIC may CONNECT to a new database, and so may a lease.
--
--   psql -v broker=countersign -v group=lease_conn -d app -f 00-hardening.sql
--   leases may connect to this database:        add  -v leases=on
--
-- Safe to run twice. What each statement is for stands beside it; `countersign config check --live` looks for all of them.
\set ON_ERROR_STOP on
\if :{?broker} \else \set broker countersign \endif
\if :{?group}  \else \set group lease_conn   \endif
\if :{?leases} \else \set leases off         \endif

-- The group that holds CONNECT. A lease that is ended is taken out of it, which stops logins even while its own row is locked.
SELECT format('CREATE ROLE %I NOLOGIN', :'group') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'group') \gexec

-- Only who is told so may connect, and leases make no temporary objects (they would fill the lock table).
SELECT format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'group') WHERE :'leases' = 'on' \gexec
-- The broker goes wherever a lease may have left something.
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'broker') WHERE EXISTS (SELECT FROM pg_roles WHERE rolname = :'broker') \gexec

-- Nobody makes objects in public but who is told so. (A new database of PostgreSQL 15 is so from the start.)
DO $$ BEGIN IF to_regnamespace('public') IS NOT NULL THEN REVOKE CREATE ON SCHEMA public FROM PUBLIC; END IF; END $$;

-- A lease that takes 25 000 advisory locks or makes 30 000 large objects fills the lock table: nothing else works then.
DO $$
DECLARE f regprocedure;
BEGIN
  FOR f IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace
      AND (p.proname ~ '^pg_(try_)?advisory_(xact_)?lock(_shared)?$' OR p.proname IN ('lo_create', 'lo_creat', 'lo_from_bytea', 'lo_put')) LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
  END LOOP;
END $$;

-- Prepared transactions survive the end of their session. This one is the cluster's and needs a restart:
--   ALTER SYSTEM SET max_prepared_transactions = 0;
\echo Roles that are no leases and connected by PUBLIC until now need a GRANT CONNECT of their own.
