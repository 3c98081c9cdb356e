//! W3: a freeze, with many live credentials at one PostgreSQL: until the last login is refused.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Outcome;
use crate::bare::Roles;
use crate::broker::browser::{Browser, field};
use crate::broker::oidc_provider::OidcProvider;
use crate::figures::load_average;
use crate::mass::{self, ms};
use crate::w2::Target;
use crate::world::{PERSON, Setup, World};

/// Measures it.
pub async fn run(binary: &Path, folder: &Path, count: usize) -> Outcome<Value> {
    let target = Target::start()?;
    let ports = World::ports()?;
    let callback = format!("https://localhost:{}/login/callback", ports.reviewer);
    let idp = OidcProvider::start(&[&callback]).await.ok_or("oidc-provider is not installed (run tests/peers)")?;
    let setup = Setup { target: Some(&target), ports: Some(ports), idp: Some(&idp.issuer), ..Setup::default() };
    let world = World::start_with(binary, folder, &setup).await?;
    let base = format!("https://localhost:{}", ports.reviewer);
    let browser = Browser::log_in(&world.reqwest()?, &base, &idp, PERSON).await;
    let held = mass::hold(&world, count, || 900).await?;
    let csrf = field(&browser.get("/freeze").await.text(), "csrf").ok_or("no freeze page")?;
    let form = [
        ("csrf", csrf.as_str()),
        ("kind", "all"),
        ("value", ""),
        ("agent", ""),
        ("reason", "a drill"),
        ("step", "confirm"),
        ("typed", "freeze"),
    ];
    let began = Instant::now();
    let frozen = async {
        let answer = browser.post("/freeze", &form).await;
        (answer.status, began.elapsed())
    };
    let (ends, (status, answered)) = tokio::join!(mass::watch(&target, "cslease", began), frozen);
    let ends = ends?;
    if !matches!(status, 200 | 303) {
        return Err(format!("the freeze was answered with {status}").into());
    }
    let proven = mass::all_proven(&world, &held, began).await?;
    let tried = mass::all_refused(&target, &held).await?;
    let load = load_average()?;
    world.stop().await?;
    let (bare, _) = Roles::make(&target, count, 0).await?.end(&target).await?;
    Ok(json!({
        "credentials": count,
        "last_login_refused_ms": ms(ends.refused), "freeze_answered_ms": ms(answered), "last_role_gone_ms": ms(ends.gone),
        "all_proofs_recorded_ms": ms(proven), "logins_tried_and_refused": tried,
        "bare": { "last_login_refused_ms": ms(bare.refused), "last_role_gone_ms": ms(bare.gone) },
        "load_average": load, "left_at_target": target.left().await?,
    }))
}
