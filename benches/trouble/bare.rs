//! The machine's own limit: as many roles with the same groups, cut by the fewest statements that do it, sent bare. No
//! broker, no record, no proof.

use std::time::{Duration, Instant};

use crate::Outcome;
use crate::mass::{self, Ends};
use crate::w2::{BROKER, DATABASE, Target};

const PREFIX: &str = "bare_";
const PASSWORD: &str = "bare-bench-password";

/// So many roles, some with a session. The sessions end by themselves when they are cut; with the time until then.
pub struct Roles {
    sessions: Vec<tokio::task::JoinHandle<Instant>>,
}

impl Roles {
    /// Makes them.
    pub async fn make(target: &Target, count: usize, sessions: usize) -> Outcome<Self> {
        let admin = target.cluster.admin("postgres").await;
        // One verifier for all, made by the server once.
        admin.batch_execute(&format!("CREATE ROLE bare_model LOGIN PASSWORD '{PASSWORD}'")).await?;
        let verifier: String =
            admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'bare_model'", &[]).await?.get(0);
        admin.batch_execute("DROP ROLE bare_model").await?;
        let make = format!(
            "DO $$ BEGIN FOR i IN 1..{count} LOOP EXECUTE format('CREATE ROLE {PREFIX}%s LOGIN PASSWORD ''{verifier}'' \
             CONNECTION LIMIT 5 IN ROLE app_read, lease_conn ROLE {BROKER}', i); END LOOP; END $$"
        );
        admin.batch_execute(&make).await?;
        let mut open = Vec::new();
        for i in 1..=sessions {
            let (client, session) = target.use_it(&format!("{PREFIX}{i}"), PASSWORD).await?;
            open.push(tokio::spawn(async move {
                let _ = session.await;
                drop(client);
                Instant::now()
            }));
        }
        Ok(Self { sessions: open })
    }

    /// Ends all of them: groups of all at once, sessions, logins one by one in one statement, the roles. Gives when the
    /// last login was refused, when the last role was gone, and when the last session was.
    pub async fn end(self, target: &Target) -> Outcome<(Ends, Duration)> {
        let broker = target.cluster.login(BROKER, target.password(), DATABASE).await?;
        let began = Instant::now();
        let statements = async {
            for sql in [SHUT, EXPEL, NO_LOGIN, DROP] {
                broker.batch_execute(sql).await?;
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        };
        let (ends, done) = tokio::join!(mass::watch(target, PREFIX, began), statements);
        done?;
        let mut cut = Duration::ZERO;
        for session in self.sessions {
            cut = cut.max(session.await?.saturating_duration_since(began));
        }
        Ok((ends?, cut))
    }
}

const SHUT: &str = "DO $$ DECLARE v text; BEGIN SELECT string_agg(rolname, ', ') INTO v FROM pg_roles WHERE starts_with(rolname, 'bare_'); \
     EXECUTE format('REVOKE app_read, lease_conn FROM %s', v); END $$";
const EXPEL: &str = "SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid \
     WHERE starts_with(r.rolname, 'bare_')";
const NO_LOGIN: &str = "DO $$ DECLARE v text; BEGIN FOR v IN SELECT rolname FROM pg_roles WHERE starts_with(rolname, 'bare_') LOOP \
     BEGIN EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL CONNECTION LIMIT 0', v); EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$";
/// 256 at once: with each statement the server works out anew what the broker's login is a member of.
const DROP: &str = "DO $$ DECLARE v text; BEGIN FOR v IN SELECT string_agg(rolname, ', ') FROM \
     (SELECT rolname, row_number() OVER () / 256 AS part FROM pg_roles WHERE starts_with(rolname, 'bare_')) AS r GROUP BY part LOOP \
     EXECUTE format('DROP OWNED BY %s CASCADE', v); EXECUTE format('DROP ROLE %s', v); END LOOP; END $$";
