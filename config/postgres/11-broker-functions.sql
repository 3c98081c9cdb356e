-- The stricter set-up (`setup = "functions"`): the broker's login may do nothing but call five functions, which make, cut and drop
-- roles whose names begin with one prefix, with groups from one list. Run once for each cluster, as a superuser, in the
-- broker's own database (`dbname` of the target).
--
--   psql -v broker=countersign -v prefix=cslease_ -d postgres -f 11-broker-functions.sql        then   \password countersign
--   INSERT INTO countersign.allowed_group VALUES ('lease_conn'), ('app_read');      -- every group that the catalogue names
--
-- Safe to run twice. The blocks between BEGIN and END are those that the broker runs itself in the direct set-up, word for
-- word (a test compares them); what is checked before each of them is what this set-up adds.
\set ON_ERROR_STOP on
\if :{?broker} \else \set broker countersign \endif
-- The broker's `name_prefix` and `_`.
\if :{?prefix} \else \set prefix cslease_    \endif

SELECT format('CREATE ROLE %I LOGIN', :'broker') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'broker') \gexec
ALTER ROLE :"broker" LOGIN NOCREATEROLE NOSUPERUSER NOCREATEDB NOREPLICATION NOBYPASSRLS INHERIT;
SELECT 'CREATE ROLE countersign_owner' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'countersign_owner') \gexec
ALTER ROLE countersign_owner NOLOGIN CREATEROLE NOSUPERUSER NOCREATEDB NOREPLICATION NOBYPASSRLS;
-- PostgreSQL 16 and later, for each group:  GRANT app_rw TO countersign_owner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;

CREATE SCHEMA IF NOT EXISTS countersign AUTHORIZATION countersign_owner;
REVOKE ALL ON SCHEMA countersign FROM PUBLIC;
GRANT USAGE ON SCHEMA countersign TO :"broker";

-- The limits. The broker can't read or change them.
CREATE TABLE IF NOT EXISTS countersign.setting (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  prefix text NOT NULL CHECK (prefix ~ '^[a-z][a-z0-9_]{2,30}$' AND NOT starts_with(prefix, 'pg_')),
  life_secs_max int NOT NULL DEFAULT 86400,
  connections_max int NOT NULL DEFAULT 100
);
CREATE TABLE IF NOT EXISTS countersign.allowed_group (name text PRIMARY KEY);
INSERT INTO countersign.setting (prefix) VALUES (:'prefix') ON CONFLICT (one) DO UPDATE SET prefix = excluded.prefix;
ALTER TABLE countersign.setting OWNER TO countersign_owner;
ALTER TABLE countersign.allowed_group OWNER TO countersign_owner;

CREATE OR REPLACE FUNCTION countersign.check_name(p_name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
  -- Exactly the forms that the broker makes, so that no other role that begins so can be meant.
  IF p_name IS NULL OR NOT EXISTS (
       SELECT FROM countersign.setting WHERE starts_with(p_name, prefix)
          AND substr(p_name, length(prefix) + 1) ~ '^([a-z2-7]{26}|reach_[0-9a-f]{16})$') THEN
    RAISE EXCEPTION 'this name is not one of a lease' USING ERRCODE = 'CS004';
  END IF;
END $countersign$;

CREATE OR REPLACE FUNCTION countersign.mint(p_in jsonb, OUT p_out jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
PERFORM countersign.check_name(p_in->>'name');
IF EXISTS (SELECT FROM jsonb_array_elements_text(p_in->'groups') AS g WHERE g NOT IN (SELECT name FROM countersign.allowed_group)) THEN
  RAISE EXCEPTION 'a group is not in countersign.allowed_group' USING ERRCODE = 'CS005';
END IF;
IF NOT EXISTS (SELECT FROM countersign.setting WHERE (p_in->>'lifetime_secs')::bigint BETWEEN 1 AND life_secs_max
                  AND (p_in->>'connection_limit')::int BETWEEN 1 AND connections_max)
   OR p_in->>'verifier' IS NULL OR NOT starts_with(p_in->>'verifier', 'SCRAM-SHA-256') THEN
  RAISE EXCEPTION 'more than countersign.setting allows, or no SCRAM verifier' USING ERRCODE = 'CS006';
END IF;
-- In: name, verifier, lifetime_secs, connection_limit, groups. Out: oid.
-- One statement, one transaction: an error leaves nothing behind. A name that is taken (42710) and a group that is
-- missing (42704) are CREATE ROLE's own errors.
DECLARE
  v_name text := p_in->>'name';
  v_sixteen boolean := current_setting('server_version_num')::int >= 160000;
  v_groups text;
  v_bad text;
BEGIN
  -- A member may SET ROLE to whatever it reaches, so attributes of groups count although they are not inherited.
  WITH RECURSIVE reached(oid) AS (
    SELECT to_regrole(quote_ident(g))::oid FROM jsonb_array_elements_text(p_in->'groups') AS g
    UNION SELECT m.roleid FROM pg_auth_members m JOIN reached ON m.member = reached.oid)
  SELECT string_agg(quote_ident(r.rolname), ', ' ORDER BY r.rolname) INTO v_bad FROM reached JOIN pg_roles r USING (oid)
   WHERE r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls OR r.rolcanlogin
      OR starts_with(r.rolname, 'pg_') AND r.rolname NOT IN ('pg_read_all_data', 'pg_write_all_data', 'pg_monitor',
           'pg_read_all_settings', 'pg_read_all_stats', 'pg_stat_scan_tables', 'pg_database_owner');
  IF v_bad IS NOT NULL THEN
    RAISE EXCEPTION 'these groups lead to more than data (LOGIN, SUPERUSER, CREATEROLE, server programs …): %', v_bad
      USING ERRCODE = 'CS003';
  END IF;
  SELECT string_agg(DISTINCT quote_ident(g), ', ') INTO v_groups FROM jsonb_array_elements_text(p_in->'groups') AS g;
  EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT PASSWORD %L'
                 ' VALID UNTIL %L CONNECTION LIMIT %s %s ROLE %s',
    v_name, p_in->>'verifier', clock_timestamp() + make_interval(secs => (p_in->>'lifetime_secs')::int),
    (p_in->>'connection_limit')::int, CASE WHEN v_sixteen THEN '' ELSE 'IN ROLE ' || v_groups END,
    -- Members, so that they may end its sessions and drop what it owns.
    quote_ident(session_user) || CASE WHEN current_user = session_user THEN '' ELSE ', ' || quote_ident(current_user) END);
  IF v_sixteen THEN
    EXECUTE format('GRANT %s TO %I WITH INHERIT TRUE, SET FALSE', v_groups, v_name);
  END IF;
  p_out := jsonb_build_object('oid', to_regrole(quote_ident(v_name))::oid::bigint);
END;
END $countersign$;

CREATE OR REPLACE FUNCTION countersign.cut(p_in jsonb, OUT p_out jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
PERFORM countersign.check_name(j->>'name') FROM jsonb_array_elements(p_in->'roles') AS j;
-- In: lock_ms, roles [{name, saved}]. Out: [{name, oid, moved, errors}].
-- Each statement has an EXCEPTION block of its own, so that one saboteur doesn't fail the rest. Groups come first:
-- nothing that a lease can do blocks their REVOKE.
DECLARE
  v record;
  v_row record;
  v_groups text;
  v_moved text;
  v_errors jsonb;
  v_is_astray bool;
  v_own oid[] := ARRAY(SELECT r.oid FROM pg_roles r WHERE r.rolname IN (session_user, current_user));
  v_shared jsonb := '[]';
BEGIN
  p_out := '[]';
  PERFORM set_config('lock_timeout', p_in->>'lock_ms', true);
  FOR v IN SELECT j->>'name' AS name, (j->>'saved')::bigint::oid AS saved, to_regrole(quote_ident(j->>'name'))::oid AS oid
             FROM jsonb_array_elements(p_in->'roles') AS j LOOP
    v_errors := '[]';
    -- An OID without a role shows as a number; a role of such a name would show in quotes.
    v_moved := CASE WHEN v.saved IS DISTINCT FROM v.oid AND v.saved::regrole::text <> v.saved::text THEN v.saved::regrole::text END;
    IF v.oid IS NOT NULL THEN
      BEGIN
        SELECT string_agg(m.roleid::regrole::text, ', ') INTO v_groups FROM pg_auth_members m WHERE m.member = v.oid;
        IF v_groups IS NOT NULL THEN
          EXECUTE format('REVOKE %s FROM %I', v_groups, v.name);
        END IF;
      EXCEPTION WHEN OTHERS THEN
        FOR v_row IN SELECT m.roleid::regrole::text AS granted FROM pg_auth_members m WHERE m.member = v.oid LOOP
          BEGIN
            EXECUTE format('REVOKE %s FROM %I', v_row.granted, v.name);
          EXCEPTION WHEN OTHERS THEN
            v_errors := v_errors || jsonb_build_object('code', SQLSTATE, 'at', 'REVOKE', 'message', SQLERRM);
          END;
        END LOOP;
      END;
      -- What a lease gave away: on 15 a role may grant itself to others, and take itself from the broker.
      FOR v_row IN SELECT m.roleid::regrole::text AS granted, m.member::regrole::text AS holder FROM pg_auth_members m
           WHERE m.roleid = v.oid AND m.member <> ALL (v_own) LOOP
        BEGIN
          EXECUTE format('REVOKE %s FROM %s', v_row.granted, v_row.holder);
        EXCEPTION WHEN OTHERS THEN
          v_errors := v_errors || jsonb_build_object('code', SQLSTATE, 'at', 'REVOKE', 'message', SQLERRM);
        END;
      END LOOP;
      -- Usually both are members as the role was made; pg_has_role would go through all leases there are, each time.
      SELECT count(DISTINCT m.member) < cardinality(v_own) INTO v_is_astray FROM pg_auth_members m
       WHERE m.roleid = v.oid AND m.member = ANY (v_own)
         AND (to_jsonb(m)->>'inherit_option')::bool IS NOT FALSE;
      IF v_is_astray THEN
        v_is_astray := NOT (pg_has_role(session_user, v.oid, 'USAGE') AND pg_has_role(current_user, v.oid, 'USAGE'));
      END IF;
      IF v_is_astray THEN
        BEGIN
          EXECUTE format('GRANT %I TO %I', v.name, session_user);
          IF current_user <> session_user THEN
            EXECUTE format('GRANT %I TO %I', v.name, current_user);
          END IF;
        EXCEPTION WHEN OTHERS THEN
          v_errors := v_errors || jsonb_build_object('code', SQLSTATE, 'at', 'GRANT', 'message', SQLERRM);
        END;
      END IF;
      BEGIN
        EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL CONNECTION LIMIT 0 VALID UNTIL ''-infinity''', v.name);
      EXCEPTION WHEN OTHERS THEN
        v_errors := v_errors || jsonb_build_object('code', SQLSTATE, 'at', 'NOLOGIN', 'message', SQLERRM);
      END;
    END IF;
    p_out := p_out || jsonb_build_object('name', v.name, 'oid', v.oid::bigint, 'moved', v_moved, 'errors', v_errors);
  END LOOP;
  -- Memberships that one of them gave in others' roles would outlive it. Rare, and without an index: looked for once.
  FOR v_row IN SELECT m.roleid::regrole::text AS granted, m.member::regrole::text AS holder FROM pg_auth_members m
       WHERE m.grantor IN (SELECT (o->>'oid')::bigint::oid FROM jsonb_array_elements(p_out) AS o)
         AND m.grantor NOT IN (m.roleid, m.member) LOOP
    BEGIN
      EXECUTE format('REVOKE %s FROM %s', v_row.granted, v_row.holder);
    EXCEPTION WHEN OTHERS THEN
      v_shared := v_shared || jsonb_build_object('code', SQLSTATE, 'at', 'REVOKE', 'message', SQLERRM);
    END;
  END LOOP;
  IF v_shared <> '[]' THEN
    p_out := (SELECT jsonb_agg(jsonb_set(o, '{errors}', (o->'errors') || v_shared)) FROM jsonb_array_elements(p_out) AS o);
  END IF;
END;
END $countersign$;

CREATE OR REPLACE FUNCTION countersign.shut(p_in jsonb, OUT p_out jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
PERFORM countersign.check_name(j->>'name') FROM jsonb_array_elements(p_in->'roles') AS j;
-- In: lock_ms, roles [{name}]. Out: {taken, failed}, memberships. Many at once, before anything else is done with any of them: without
-- its groups a lease has no CONNECT and no data. What fails here is done role by role afterwards (cut), so that it may.
DECLARE
  v_row record;
  v_taken int := 0;
  v_failed int := 0;
BEGIN
  PERFORM set_config('lock_timeout', p_in->>'lock_ms', true);
  FOR v_row IN
    SELECT m.granted, string_agg(m.member, ', ') AS members, count(*)::int AS n
      FROM (SELECT a.roleid::regrole::text AS granted, a.member::regrole::text AS member,
                   (row_number() OVER (PARTITION BY a.roleid) - 1) / 500 AS part
              FROM pg_auth_members a JOIN pg_roles r ON r.oid = a.member
             WHERE r.rolname IN (SELECT j->>'name' FROM jsonb_array_elements(p_in->'roles') AS j)) AS m
     GROUP BY m.granted, m.part LOOP
    BEGIN
      EXECUTE format('REVOKE %s FROM %s', v_row.granted, v_row.members);
      v_taken := v_taken + v_row.n;
    EXCEPTION WHEN OTHERS THEN v_failed := v_failed + v_row.n;
    END;
  END LOOP;
  p_out := jsonb_build_object('taken', v_taken, 'failed', v_failed);
END;
END $countersign$;

CREATE OR REPLACE FUNCTION countersign.drop(p_in jsonb, OUT p_out jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
PERFORM countersign.check_name(j->>'name') FROM jsonb_array_elements(p_in->'roles') AS j;
-- In: lock_ms, roles [{name}]. Out: [{name, error}]. As many roles in one subtransaction as go together: with each statement
-- the server works out anew what the broker is a member of, which is all leases there are. Where one resists, fewer; it
-- alone gets an error. Those that it is too late for get one too: a statement that runs out of time would lose all.
DECLARE
  v_names text[] := ARRAY(SELECT j->>'name' FROM jsonb_array_elements(p_in->'roles') AS j);
  v_at int := 1;
  v_many int := cardinality(v_names);
  v_resists_to int := 0;
  v_some text;
  v_error jsonb;
BEGIN
  p_out := '[]';
  PERFORM set_config('lock_timeout', p_in->>'lock_ms', true);
  WHILE v_at <= cardinality(v_names) LOOP
    v_error := NULL;
    IF clock_timestamp() > statement_timestamp() + interval '3 s' THEN
      v_many := cardinality(v_names);
      v_error := jsonb_build_object('code', '57014', 'at', 'DROP', 'message', 'no time was left for it, since others resist');
    ELSE
      BEGIN
        SELECT string_agg(quote_ident(n), ', ') INTO v_some FROM unnest(v_names[v_at:v_at + v_many - 1]) AS n;
        EXECUTE format('DROP OWNED BY %s CASCADE', v_some);
        EXECUTE format('DROP ROLE %s', v_some);
      EXCEPTION WHEN OTHERS THEN
        IF v_many > 1 THEN
          v_resists_to := least(v_at + v_many - 1, cardinality(v_names));
          v_many := v_many / 4 + 1;
          CONTINUE;
        END IF;
        IF SQLSTATE <> '42704' THEN -- it is gone already
          v_error := jsonb_build_object('code', SQLSTATE, 'at', 'DROP', 'message', SQLERRM);
        END IF;
      END;
    END IF;
    SELECT p_out || coalesce(jsonb_agg(jsonb_build_object('name', n, 'error', v_error)), '[]') INTO p_out
      FROM unnest(v_names[v_at:v_at + v_many - 1]) AS n;
    v_at := v_at + v_many;
    IF v_at > v_resists_to THEN
      v_many := v_many * 2;
    END IF;
  END LOOP;
END;
END $countersign$;

CREATE OR REPLACE FUNCTION countersign.reach(p_in jsonb, OUT p_out jsonb) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $countersign$ BEGIN
PERFORM countersign.check_name(p_in->>'reach');
PERFORM countersign.check_name(j) FROM jsonb_array_elements_text(p_in->'into') AS j WHERE j NOT IN (SELECT name FROM countersign.allowed_group);
-- In: reach, into. Makes session_user a member of the roles in `into` (a lease, or groups) through a role that nobody has seen yet,
-- so that no lock and no REVOKE of a lease can be in its way, and no lease gets anything. Rolled back or dropped by the caller: signals
-- that were sent meanwhile stay sent.
DECLARE
  v_into text;
BEGIN
  SELECT string_agg(quote_ident(r.rolname), ', ') INTO v_into FROM pg_roles r
   WHERE r.rolname IN (SELECT jsonb_array_elements_text(p_in->'into'))
     AND NOT (r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls);
  EXECUTE format('CREATE ROLE %I NOLOGIN ROLE %I', p_in->>'reach', session_user);
  IF v_into IS NOT NULL THEN
    EXECUTE format('GRANT %s TO %I', v_into, p_in->>'reach');
  END IF;
  p_out := 'true';
END;
END $countersign$;

ALTER FUNCTION countersign.check_name(text) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.check_name(text) FROM PUBLIC;
ALTER FUNCTION countersign.mint(jsonb) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.mint(jsonb) FROM PUBLIC;
ALTER FUNCTION countersign.cut(jsonb) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.cut(jsonb) FROM PUBLIC;
ALTER FUNCTION countersign.shut(jsonb) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.shut(jsonb) FROM PUBLIC;
ALTER FUNCTION countersign.drop(jsonb) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.drop(jsonb) FROM PUBLIC;
ALTER FUNCTION countersign.reach(jsonb) OWNER TO countersign_owner;
REVOKE ALL ON FUNCTION countersign.reach(jsonb) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION countersign.mint(jsonb) TO :"broker";
GRANT EXECUTE ON FUNCTION countersign.cut(jsonb) TO :"broker";
GRANT EXECUTE ON FUNCTION countersign.shut(jsonb) TO :"broker";
GRANT EXECUTE ON FUNCTION countersign.drop(jsonb) TO :"broker";
GRANT EXECUTE ON FUNCTION countersign.reach(jsonb) TO :"broker";
