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
