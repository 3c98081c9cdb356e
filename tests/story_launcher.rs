//! "Who launches an agent can't approve what it asks for, and neither can whose account it runs as" (guarantee 6).

#[path = "support/broker.rs"]
mod broker;
#[path = "support/identity_kit.rs"]
mod kit;

use broker::agent::{Agent, customers};
use broker::{Plan, World};
use countersign::time::{Clock as _, SystemClock};
use kit::Signer;
use serde_json::json;

const GITHUB: &str = "https://token.actions.githubusercontent.com";

/// The world with jobs of GitHub, whose signing key the test holds, and machines that the people's provider knows.
async fn world() -> Option<(World, Signer)> {
    let mut world = Plan { people: true, ..Plan::default() }.start("story_launcher").await?;
    let (idp, audience, key) = (world.idp().issuer.clone(), world.ports.agent_url(), Signer::es256());
    std::fs::write(world.file("github.jwks.json"), json!({ "keys": [key.jwk("k", "sig")] }).to_string()).unwrap();
    let issuers = format!(
        "[[issuer]]\nissuer = \"{GITHUB}\"\npreset = \"github-actions\"\naudience = \"{audience}\"\nalgorithms = [\"ES256\"]\n\
         jwks_file = \"github.jwks.json\"\nrequire = {{ repository_owner_id = [\"9919\"] }}\n\
         [[issuer]]\nissuer = \"{idp}\"\npreset = \"generic\"\naudience = \"{audience}\"\nalgorithms = [\"ES256\"]\n\
         allow_private_network = true\nrequire = {{ client_id = [\"agent-7\"] }}\n\
         [[agent]]\nmatch = \"{GITHUB}#repo:corp/app:*\"\nowner = \"dora\"\n\
         [[agent]]\nmatch = \"{idp}#agent-7\"\nowner = \"dora\"\n\n[reviewer_login]"
    );
    world.change("countersign.toml", "[reviewer_login]", &issuers);
    // Ben launches jobs at GitHub; a machine account is ana's.
    let ben = "subject = \"ben\" }";
    world.change("countersign.toml", ben, &format!("{ben}, {{ issuer = \"{GITHUB}\", subject = \"583231\" }}"));
    let ana = "subject = \"ana-second\" }";
    world.change("countersign.toml", ana, &format!("{ana}, {{ issuer = \"{idp}\", subject = \"agent-7\" }}"));
    world.restart().await;
    Some((world, key))
}

/// Refused to this person, and given by that one.
async fn decided(world: &World, agent: &Agent, refused: &str, may: &str) {
    let id = agent.asked("T-1", customers("read")).await;
    let (no, yes) = (world.browser(refused).await, world.browser(may).await);
    let seen = no.form(&id).await;
    assert!(seen.digest.is_none() && seen.page.contains("You launched the agent"), "{}", seen.page);
    let digest = yes.form(&id).await.digest.expect("somebody may vote");
    for verdict in ["approve", "deny"] {
        let answer = no.vote(&id, &seen, &digest, verdict, "").await;
        assert!(answer.status == 403 && answer.text().contains("may not decide about this"), "{}", answer.text());
    }
    assert_eq!(agent.state(&id).await, "pending");
    yes.approved(&id).await;
    assert_eq!(agent.state(&id).await, "active");
}

#[tokio::test]
async fn who_launched_a_job_cannot_vote_on_it() {
    let Some((world, key)) = world().await else { return };
    let now = SystemClock.wall().secs();
    let job = |actor_id: &str| {
        let claims = json!({
            "iss": GITHUB, "aud": world.ports.agent_url(), "iat": now, "nbf": now - 5, "exp": now + 300, "jti": "x",
            "sub": "repo:corp/app:ref:refs/heads/main", "repository": "corp/app", "repository_id": "1",
            "repository_owner": "corp", "repository_owner_id": "9919", "actor": "ana", "actor_id": actor_id,
        });
        let token = key.sign(&json!({ "alg": "ES256", "kid": "k", "typ": "JWT" }), &claims);
        Agent { token: Some(token), ..world.agent("ops") }
    };
    // The name is ana's, the number ben's: the number counts.
    decided(&world, &job("583231"), "ben", "ana").await;
    // Somebody whom the directory doesn't know launched another one: ben may vote.
    let agent = job("7");
    let id = agent.asked("T-2", customers("read")).await;
    world.browser("ben").await.approved(&id).await;
}

#[tokio::test]
async fn whose_account_an_agent_runs_as_cannot_vote_on_it_and_it_never_logs_in() {
    let Some((world, _)) = world().await else { return };
    let token = world.idp().agent_token(&world.ports.agent_url(), Some("run")).await;
    let agent = Agent { token: Some(token), ..world.agent("ops") };
    decided(&world, &agent, "ana", "ben").await;
    let refused = world.try_browser("agent-7").await.err().expect("no session for an agent");
    assert!(refused.status == 403 && refused.text().contains("knows as an agent"), "{}", refused.text());
}
