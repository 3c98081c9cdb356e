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
