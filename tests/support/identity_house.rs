//! A door with one OIDC issuer and one trust domain, both with keys that the test holds: what is refused must be refused
//! on both kinds of token.

#![allow(dead_code)] // each test file uses a part

use std::collections::BTreeMap;
use std::sync::Arc;

use countersign::config::{IssuerConfig, IssuerPreset, SpiffeConfig};
use countersign::core::id::TierName;
use countersign::identity::{Identities, IdentityError, Refusal, VerifiedAgent};
use countersign::time::Clock as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::kit::{Signer, TestClock, with};

pub const ISSUER: &str = "https://issuer.example";
pub const AUDIENCE: &str = "https://broker.example";

pub fn issuer_config(issuer: &str, preset: IssuerPreset) -> IssuerConfig {
    IssuerConfig {
        issuer: issuer.to_owned(),
        preset,
        audience: AUDIENCE.to_owned(),
        algorithms: ["ES256", "ES384", "RS256", "PS256", "EdDSA"].map(str::to_owned).to_vec(),
        jwks_file: Some("jwks.json".into()),
        ca_file: None,
        allow_private_network: false,
        require: BTreeMap::new(),
        attributes: BTreeMap::new(),
        launcher: None,
        tier_max: None,
        token_life_secs_max: 3600,
    }
}

/// The door with one OIDC issuer and one trust domain, both with the same signers (kids `es256`, `rsa`, …).
pub struct House {
    pub clock: Arc<TestClock>,
    pub identities: Identities,
    pub folder: tempfile::TempDir,
    pub es256: Signer,
    pub es384: Signer,
    pub rsa: Signer,
    pub ed25519: Signer,
    pub stop: CancellationToken,
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The two kinds of token that come through the door.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Oidc,
    Svid,
}
pub const BOTH: [Kind; 2] = [Kind::Oidc, Kind::Svid];

impl House {
    pub fn build(issuer: IssuerConfig) -> Result<Self, Vec<IdentityError>> {
        let clock = TestClock::new();
        let folder = tempfile::tempdir().unwrap();
        let (es256, es384, rsa, ed25519) = (Signer::es256(), Signer::es384(), Signer::rsa(), Signer::ed25519());
        let all = |key_use: &str| {
            let keys = [&es256, &es384, &rsa, &ed25519].map(|s| s.jwk(&s.alg().to_lowercase(), key_use));
            json!({ "keys": keys }).to_string()
        };
        std::fs::write(folder.path().join("jwks.json"), all("sig")).unwrap();
        std::fs::write(folder.path().join("corp.json"), all("jwt-svid")).unwrap();
        let spiffe = SpiffeConfig {
            workload_api: None,
            bundles: BTreeMap::from([("corp".to_owned(), "corp.json".into())]),
            trust_domains: vec!["corp".to_owned()],
            audience: AUDIENCE.to_owned(),
            tier_max: Some(TierName::new("change").unwrap()),
        };
        let identities = Identities::new(Some(&spiffe), &[issuer], folder.path(), clock.clone())?;
        let stop = CancellationToken::new();
        identities.start(&stop);
        Ok(Self { clock, identities, folder, es256, es384, rsa, ed25519, stop })
    }

    pub fn new() -> Self {
        Self::build(issuer_config(ISSUER, IssuerPreset::Generic)).unwrap()
    }

    pub fn header(signer: &Signer) -> Value {
        json!({ "alg": signer.alg(), "kid": signer.alg().to_lowercase(), "typ": "JWT" })
    }

    pub fn claims(&self, kind: Kind) -> Value {
        let now = self.clock.now_secs();
        let common = json!({ "aud": AUDIENCE, "iat": now, "exp": now + 300 });
        match kind {
            Kind::Oidc => with(&common, json!({ "iss": ISSUER, "sub": "agent-7" })),
            Kind::Svid => with(&common, json!({ "sub": "spiffe://corp/agent/7" })),
        }
    }

    pub async fn ask(&self, token: &str) -> Result<VerifiedAgent, IdentityError> {
        self.identities.authenticate_bearer(token, self.clock.wall()).await
    }

    pub async fn ask_claims(&self, claims: &Value) -> Result<VerifiedAgent, IdentityError> {
        self.ask(&self.es256.sign(&Self::header(&self.es256), claims)).await
    }

    /// A token with these changes is refused for this reason; without them it is accepted.
    pub async fn refuses(&self, kind: Kind, changes: Value, refusal: Refusal) {
        let base = self.claims(kind);
        self.ask_claims(&base).await.unwrap();
        let error = self.ask_claims(&with(&base, changes.clone())).await.expect_err(&format!("{kind:?} {changes}"));
        assert_eq!(error.refusal(), refusal, "{kind:?} {changes}: {error}");
    }

    /// A token with these changes of its header is refused for this reason.
    pub async fn refuses_header(&self, kind: Kind, changes: Value, refusal: Refusal) {
        let header = with(&Self::header(&self.es256), changes.clone());
        let token = self.es256.sign(&header, &self.claims(kind));
        let error = self.ask(&token).await.expect_err(&format!("{kind:?} {changes}"));
        assert_eq!(error.refusal(), refusal, "{kind:?} {changes}: {error}");
    }
}
