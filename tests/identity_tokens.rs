//! "A token that is not exactly right gets me nowhere": the regressions A1 to A7, A9 and A15 by name, each on a JWT-SVID and
//! on an OIDC token, through the same door that the server uses.

#[path = "support/identity_house.rs"]
mod house;
#[path = "support/identity_kit.rs"]
mod kit;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;
use countersign::config::IssuerPreset;
use countersign::core::id::TierName;
use countersign::identity::{Method, Refusal};
use house::{AUDIENCE, BOTH, House, ISSUER, Kind, issuer_config};
use kit::{IssuerServer, Signer, with};
use serde_json::json;

#[tokio::test]
async fn every_allowed_algorithm_is_accepted_and_says_who_it_is() {
    let house = House::new();
    for signer in [&house.es256, &house.es384, &house.rsa, &house.ed25519] {
        let agent = house.ask(&signer.sign(&House::header(signer), &house.claims(Kind::Oidc))).await.unwrap();
        assert_eq!(agent.id.as_str(), "https://issuer.example#agent-7");
        assert_eq!((agent.method, agent.issuer.as_str(), agent.subject.as_str()), (Method::Oidc, ISSUER, "agent-7"));
        assert_eq!(agent.expires_at.secs(), house.clock.now_secs() + 300);
        assert_eq!((agent.tier_max, agent.confirmation), (None, None));
    }
    let ps256 = with(&House::header(&house.rsa), json!({ "alg": "PS256" }));
    for kind in BOTH {
        house.ask(&house.rsa.sign(&ps256, &house.claims(kind))).await.unwrap();
    }
    for signer in [&house.es256, &house.es384, &house.rsa] {
        let agent = house.ask(&signer.sign(&House::header(signer), &house.claims(Kind::Svid))).await.unwrap();
        assert_eq!(agent.id.as_str(), "spiffe://corp/agent/7");
        assert_eq!((agent.method, agent.issuer.as_str()), (Method::JwtSvid, "spiffe://corp"));
        assert_eq!(agent.tier_max, Some(TierName::new("change").unwrap()));
    }
    // JWT-SVID, section 2.1, doesn't have EdDSA.
    let svid = house.ed25519.sign(&House::header(&house.ed25519), &house.claims(Kind::Svid));
    assert_eq!(house.ask(&svid).await.unwrap_err().refusal(), Refusal::Unacceptable);
}

#[tokio::test]
async fn a01_alg_none_a_changed_signature_or_the_wrong_key_type() {
    let house = House::new();
    for kind in BOTH {
        for alg in ["none", "None", "NONE", "", "es256", "ES512", "RS1", "HS256"] {
            house
                .refuses_header(
                    kind,
                    json!({ "alg": alg }),
                    if alg.is_empty() { Refusal::Malformed } else { Refusal::Unacceptable },
                )
                .await;
        }
        house.refuses_header(kind, json!({ "alg": null }), Refusal::Unacceptable).await;
        house.refuses_header(kind, json!({ "alg": ["ES256"] }), Refusal::Malformed).await;
        let good = house.es256.sign(&House::header(&house.es256), &house.claims(kind));
        let (input, signature) = good.rsplit_once('.').unwrap();
        // Unsigned, cut, and with every single byte of the signature flipped.
        assert_eq!(house.ask(&format!("{input}.")).await.unwrap_err().refusal(), Refusal::Malformed);
        assert!(house.ask(input).await.is_err());
        let bytes = B64.decode(signature).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let error = house.ask(&format!("{input}.{}", B64.encode(&changed))).await.unwrap_err();
            assert_eq!(error.refusal(), Refusal::BadSignature);
        }
        let zeros = house.ask(&format!("{input}.{}", B64.encode([0u8; 64]))).await.unwrap_err();
        assert_eq!(zeros.refusal(), Refusal::BadSignature);
        // The payload of one token under the signature of another.
        let other = house.es256.sign(&House::header(&house.es256), &with(&house.claims(kind), json!({ "jti": "x" })));
        let spliced = format!("{}.{signature}", other.rsplit_once('.').unwrap().0);
        assert_eq!(house.ask(&spliced).await.unwrap_err().refusal(), Refusal::BadSignature);
        // A key of another type than the header says, by `kid` and by `alg`.
        for (alg, kid) in [("ES256", "rs256"), ("RS256", "es256"), ("ES384", "es256"), ("PS256", "es256")] {
            house.refuses_header(kind, json!({ "alg": alg, "kid": kid }), Refusal::BadSignature).await;
        }
        // One RSA key does both, but a signature made with one is none of the other.
        for (made, said) in [("RS256", "PS256"), ("PS256", "RS256")] {
            let header = with(&House::header(&house.rsa), json!({ "alg": said }));
            let token = house.rsa.sign_as(made, &header.to_string(), &house.claims(kind).to_string());
            assert_eq!(house.ask(&token).await.unwrap_err().refusal(), Refusal::BadSignature, "{made} as {said}");
        }
        let foreign = Signer::es256().sign(&House::header(&house.es256), &house.claims(kind));
        assert_eq!(house.ask(&foreign).await.unwrap_err().refusal(), Refusal::BadSignature);
    }
}

#[tokio::test]
async fn a02_a_public_key_is_no_hmac_key() {
    let house = House::new();
    for kind in BOTH {
        for signer in [&house.rsa, &house.es256] {
            for (alg, hmac) in [("HS256", aws_lc_rs::hmac::HMAC_SHA256), ("HS384", aws_lc_rs::hmac::HMAC_SHA384)] {
                let header = with(&House::header(signer), json!({ "alg": alg }));
                let input =
                    format!("{}.{}", B64.encode(header.to_string()), B64.encode(house.claims(kind).to_string()));
                let tag =
                    aws_lc_rs::hmac::sign(&aws_lc_rs::hmac::Key::new(hmac, &signer.public_bytes()), input.as_bytes());
                let error = house.ask(&format!("{input}.{}", B64.encode(tag))).await.unwrap_err();
                assert_eq!(error.refusal(), Refusal::Unacceptable);
            }
        }
    }
    // A symmetric key in the issuer's own set is never a key either.
    let jwks = json!({ "keys": [{ "kty": "oct", "kid": "es256", "k": B64.encode([1u8; 32]) }] });
    std::fs::write(house.folder.path().join("jwks.json"), jwks.to_string()).unwrap();
    house.clock.advance_secs(60);
    let error = house.ask_claims(&house.claims(Kind::Oidc)).await.unwrap_err();
    assert_eq!(error.refusal(), Refusal::KeysUnavailable);
    // An algorithm that the operator doesn't allow is refused though the key could do it.
    let mut config = issuer_config(ISSUER, IssuerPreset::Generic);
    config.algorithms = vec!["RS256".into()];
    let strict = House::build(config).unwrap();
    let error = strict.ask_claims(&strict.claims(Kind::Oidc)).await.unwrap_err();
    assert_eq!(error.refusal(), Refusal::Unacceptable);
    for bad in ["none", "HS256", "ES512", ""] {
        let mut config = issuer_config(ISSUER, IssuerPreset::Generic);
        config.algorithms = vec![bad.into()];
        assert!(House::build(config).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a03_dates_are_integers_in_a_sane_range() {
    let house = House::new();
    let now = house.clock.now_secs();
    for kind in BOTH {
        for claim in ["exp", "nbf", "iat"] {
            for bad in [
                json!((now + 60).to_string()),
                json!(1e10),
                json!(1_795_000_000.5),
                json!(-1),
                json!(true),
                json!([now]),
                json!({}),
                json!(253_402_300_800_u64),
                json!(u64::MAX),
                json!("NaN"),
                json!(i64::MIN),
            ] {
                house.refuses(kind, json!({ claim: bad }), Refusal::Claim).await;
            }
            // What JSON has no value for.
            for text in ["NaN", "Infinity", "1e400", "018", "+1", "18446744073709551616"] {
                let base = house.claims(kind);
                let payload = with(&base, json!({ claim: "@" })).to_string().replace("\"@\"", text);
                let token = house.es256.sign_text(&House::header(&house.es256).to_string(), &payload);
                assert!(house.ask(&token).await.is_err(), "{claim} {text}");
            }
        }
        house.refuses(kind, json!({ "exp": null }), Refusal::Claim).await;
        house.refuses(kind, json!({ "exp": now }), Refusal::Expired).await;
        house.refuses(kind, json!({ "exp": 0 }), Refusal::Expired).await;
        house.refuses(kind, json!({ "nbf": now + 31 }), Refusal::NotYetValid).await;
        house.refuses(kind, json!({ "iat": now + 31 }), Refusal::NotYetValid).await;
        house.ask_claims(&with(&house.claims(kind), json!({ "nbf": now + 30 }))).await.unwrap();
        house.refuses(kind, json!({ "exp": now + 90_000 }), Refusal::Claim).await;
        // `exp` before `iat`, both within the leeway.
        house.refuses(kind, json!({ "iat": now + 20, "exp": now + 10 }), Refusal::Claim).await;
    }
    house.refuses(Kind::Oidc, json!({ "iat": null }), Refusal::Claim).await;
    house.refuses(Kind::Oidc, json!({ "iat": now - 10, "exp": now + 3591 }), Refusal::Claim).await;
    let svid = house.ask_claims(&with(&house.claims(Kind::Svid), json!({ "iat": null }))).await;
    assert!(svid.is_ok(), "JWT-SVID doesn't require iat");
    // The very second: alive a millisecond before, over at `exp`.
    let token = house.es256.sign(&House::header(&house.es256), &house.claims(Kind::Oidc));
    house.clock.advance_secs(300);
    assert_eq!(house.ask(&token).await.unwrap_err().refusal(), Refusal::Expired);
}

#[tokio::test]
async fn a04_an_unknown_critical_extension() {
    let house = House::new();
    for kind in BOTH {
        for crit in [json!(["exp"]), json!(["urn:example:x"]), json!([]), json!("exp"), json!(["b64"]), json!({})] {
            house.refuses_header(kind, json!({ "crit": crit }), Refusal::Unacceptable).await;
        }
        for member in
            [json!({ "b64": false }), json!({ "b64": true }), json!({ "zip": "DEF" }), json!({ "enc": "A128GCM" })]
        {
            house.refuses_header(kind, member, Refusal::Unacceptable).await;
        }
        house.refuses_header(kind, json!({ "cty": "JWT" }), Refusal::Unacceptable).await;
    }
}

#[tokio::test]
async fn a05_the_audience_is_ours_and_nobody_elses() {
    let house = House::new();
    for kind in BOTH {
        house.ask_claims(&with(&house.claims(kind), json!({ "aud": [AUDIENCE] }))).await.unwrap();
        for bad in [
            json!(null),
            json!(""),
            json!([]),
            json!("https://other.example"),
            json!([AUDIENCE, "https://other.example"]),
            json!(["https://other.example", AUDIENCE]),
            json!([AUDIENCE, AUDIENCE]),
            json!([[AUDIENCE]]),
            json!([null]),
            json!({ "0": AUDIENCE }),
            json!(true),
            json!(1),
            json!(format!("{AUDIENCE}/")),
            json!(format!("{AUDIENCE} ")),
            json!(AUDIENCE.to_uppercase()),
            json!(format!("{AUDIENCE},https://other.example")),
            json!("https://broker.exampl"),
        ] {
            house.refuses(kind, json!({ "aud": bad }), Refusal::Audience).await;
        }
        // Two members `aud`: whichever a parser would take, it is refused.
        let base = with(&house.claims(kind), json!({ "aud": "@" })).to_string();
        let twice = base.replace("\"aud\":\"@\"", &format!("\"aud\":\"{AUDIENCE}\",\"aud\":\"{AUDIENCE}\""));
        let token = house.es256.sign_text(&House::header(&house.es256).to_string(), &twice);
        assert_eq!(house.ask(&token).await.unwrap_err().refusal(), Refusal::Malformed);
    }
}

#[tokio::test]
async fn a06_kid_is_only_looked_up_and_header_urls_are_never_fetched() {
    let house = House::new();
    let mallory = Signer::es256();
    let elsewhere = IssuerServer::start(json!({ "keys": [mallory.jwk("m", "sig")] })).await;
    for kind in BOTH {
        for kid in
            ["../../../../dev/null", "/etc/passwd", "x' OR '1'='1", "es256\u{0}", "ES256", " es256", "https://evil/k"]
        {
            house.refuses_header(kind, json!({ "kid": kid }), Refusal::UnknownKey).await;
        }
        for kid in [json!(1), json!(["es256"]), json!({}), json!(""), json!("k".repeat(257))] {
            house.refuses_header(kind, json!({ "kid": kid }), Refusal::Malformed).await;
        }
        let jwks = format!("{}/jwks", elsewhere.url);
        for extra in [
            json!({ "jku": jwks }),
            json!({ "x5u": jwks }),
            json!({ "jwk": mallory.jwk("m", "sig") }),
            json!({ "x5c": ["MIIB"], "x5t": "x", "x5t#S256": "x" }),
        ] {
            for kid in ["m", "es256"] {
                let header = with(&House::header(&mallory), with(&extra, json!({ "kid": kid })));
                let token = mallory.sign(&header, &house.claims(kind));
                assert!(house.ask(&token).await.is_err(), "{kind:?} {extra}");
            }
            // Beside a good signature they mean nothing: GitHub sends `x5t`.
            let header = with(&House::header(&house.es256), extra);
            house.ask(&house.es256.sign(&header, &house.claims(kind))).await.unwrap();
        }
    }
    assert_eq!(elsewhere.requests(), 0, "nothing was fetched");
    // Without `kid`: an OIDC token is taken if only one key fits, a JWT-SVID never.
    let header = json!({ "alg": "ES256" });
    house.ask(&house.es256.sign(&header, &house.claims(Kind::Oidc))).await.unwrap();
    house.refuses_header(Kind::Svid, json!({ "kid": null }), Refusal::Malformed).await;
}

#[tokio::test]
async fn a07_a_token_of_another_kind() {
    let house = House::new();
    for kind in BOTH {
        for typ in [
            "at+jwt",
            "application/at+jwt",
            "logout+jwt",
            "secevent+jwt",
            "dpop+jwt",
            "token-introspection+jwt",
            "jwt",
            "JWE",
            "oauth-authz-req+jwt",
        ] {
            house.refuses_header(kind, json!({ "typ": typ }), Refusal::Unacceptable).await;
        }
        house.refuses_header(kind, json!({ "typ": 1 }), Refusal::Malformed).await;
        let untyped = with(&House::header(&house.es256), json!({ "typ": null }));
        house.ask(&house.es256.sign(&untyped, &house.claims(kind))).await.unwrap();
        // Logout tokens of older providers say it in the payload only; Keycloak says there what it is.
        let logout = json!({ "events": { "http://schemas.openid.net/event/backchannel-logout": {} } });
        house.refuses(kind, logout, Refusal::Unacceptable).await;
        for typ in ["Refresh", "Offline", "Logout"] {
            house.refuses(kind, json!({ "typ": typ }), Refusal::Unacceptable).await;
        }
        // What a person's browser login gives is no agent's token.
        if kind == Kind::Oidc {
            house.refuses(kind, json!({ "nonce": "n-0S6_WzA2Mj" }), Refusal::Unacceptable).await;
        }
        // A token that is bound to a key is no bearer token (A11, D8).
        house.refuses(kind, json!({ "cnf": { "jkt": "x" } }), Refusal::Unacceptable).await;
    }
    let jose = with(&House::header(&house.es256), json!({ "typ": "JOSE" }));
    house.ask(&house.es256.sign(&jose, &house.claims(Kind::Svid))).await.unwrap();
    assert!(house.ask(&house.es256.sign(&jose, &house.claims(Kind::Oidc))).await.is_err());
}

#[tokio::test]
async fn a09_identity_comes_from_the_verified_bytes_and_their_signer() {
    let house = House::new();
    // The header's and other members' words on who it is mean nothing.
    let header = with(&House::header(&house.es256), json!({ "sub": "root", "iss": "https://other.example" }));
    let agent = house.ask(&house.es256.sign(&header, &house.claims(Kind::Oidc))).await.unwrap();
    assert_eq!((agent.subject.as_str(), agent.issuer.as_str()), ("agent-7", ISSUER));
    let claims =
        with(&house.claims(Kind::Svid), json!({ "iss": "https://spire.corp", "spiffe_id": "spiffe://corp/root" }));
    assert_eq!(house.ask_claims(&claims).await.unwrap().subject, "spiffe://corp/agent/7");
    // Our own trust domain's key for a SPIFFE ID of another one, and for an issuer that nobody configured.
    house.refuses(Kind::Svid, json!({ "sub": "spiffe://other/agent/7" }), Refusal::UnknownIssuer).await;
    house.refuses(Kind::Oidc, json!({ "iss": "https://other.example" }), Refusal::UnknownIssuer).await;
    house.refuses(Kind::Oidc, json!({ "iss": null }), Refusal::UnknownIssuer).await;
    house.refuses(Kind::Oidc, json!({ "iss": [ISSUER] }), Refusal::UnknownIssuer).await;
    for sub in [json!(null), json!(""), json!(7), json!(["agent-7"]), json!({})] {
        house.refuses(Kind::Oidc, json!({ "sub": sub }), Refusal::Claim).await;
    }
    // A SPIFFE ID as an OIDC subject is not that SPIFFE ID.
    let agent =
        house.ask_claims(&with(&house.claims(Kind::Oidc), json!({ "sub": "spiffe://corp/agent/7" }))).await.unwrap();
    assert_eq!(agent.id.as_str(), "https://issuer.example#spiffe://corp/agent/7");
    assert!(!agent.id.is_spiffe());
}

#[tokio::test]
async fn a15_another_spelling_is_another_identity() {
    let house = House::new();
    let plain = house.ask_claims(&house.claims(Kind::Oidc)).await.unwrap();
    for sub in [
        "Agent-7",
        "agent-7 ",
        " agent-7",
        "agent-7.",
        "agent\u{2010}7",
        "agent-\u{ff17}",
        "agent-7\u{200b}",
        "a\u{301}",
    ] {
        let other = house.ask_claims(&with(&house.claims(Kind::Oidc), json!({ "sub": sub }))).await.unwrap();
        assert_ne!(other.id, plain.id, "{sub:?}");
        assert_eq!(other.subject, sub, "taken as it is, not normalised");
    }
    for iss in [
        "https://ISSUER.example",
        "https://issuer.example/",
        "https://issuer.example.",
        "https://issuer.example:443",
        " https://issuer.example",
    ] {
        house.refuses(Kind::Oidc, json!({ "iss": iss }), Refusal::UnknownIssuer).await;
    }
    house.refuses(Kind::Oidc, json!({ "sub": "agent\u{7}" }), Refusal::Claim).await;
    for sub in [
        "spiffe://corp/agent/7/",
        "spiffe://CORP/agent/7",
        "spiffe://corp./agent/7",
        "spiffe://corp/agent/%37",
        "spiffe://corp/agent//7",
        "spiffe://corp/a/../agent/7",
        "spiffe://corp",
    ] {
        let error = house.ask_claims(&with(&house.claims(Kind::Svid), json!({ "sub": sub }))).await.unwrap_err();
        assert!(matches!(error.refusal(), Refusal::Claim | Refusal::UnknownIssuer), "{sub}: {error}");
    }
    assert!(
        house.ask_claims(&with(&house.claims(Kind::Svid), json!({ "sub": "SPIFFE://corp/agent/7" }))).await.is_err()
    );
    let other =
        house.ask_claims(&with(&house.claims(Kind::Svid), json!({ "sub": "spiffe://corp/Agent/7" }))).await.unwrap();
    assert_ne!(other.id.as_str(), "spiffe://corp/agent/7");
}

#[tokio::test]
async fn limits_of_size_depth_and_form() {
    let house = House::new();
    let big = with(&house.claims(Kind::Oidc), json!({ "x": "y".repeat(16 * 1024) }));
    assert_eq!(house.ask_claims(&big).await.unwrap_err().refusal(), Refusal::Malformed);
    let deep = with(&house.claims(Kind::Oidc), json!({ "x": [[[[[[[[1]]]]]]]] }));
    assert_eq!(house.ask_claims(&deep).await.unwrap_err().refusal(), Refusal::Malformed);
    let good = house.es256.sign(&House::header(&house.es256), &house.claims(Kind::Oidc));
    for bad in [
        String::new(),
        "a".into(),
        "a.b".into(),
        "a.b.c".into(),
        "..".into(),
        format!("{good}."),
        format!(".{good}"),
        format!("{good}.x.y"),
        format!("{good}="),
        format!(" {good}"),
        format!("{good}\n"),
        good.replace('.', ".."),
        good.replacen('.', "=.", 1),
    ] {
        assert_eq!(house.ask(&bad).await.unwrap_err().refusal(), Refusal::Malformed, "{bad:?}");
    }
    // A second spelling of the last base64url character is no second token.
    let (input, signature) = good.rsplit_once('.').unwrap();
    for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".chars() {
        let other = format!("{input}.{}{last}", &signature[..signature.len() - 1]);
        assert!(other == good || house.ask(&other).await.is_err());
    }
}

#[tokio::test]
async fn r02_refusals_repeat_nothing_of_the_token() {
    let house = House::new();
    let canary = "canary-5f3a";
    for kind in BOTH {
        for changes in [
            json!({ "aud": canary }),
            json!({ "sub": canary, "iss": canary }),
            json!({ "exp": canary }),
            json!({ "typ": "Refresh", "x": canary }),
            json!({ "sub": format!("spiffe://{canary}/x"), "iss": null }),
            json!({ "iss": canary }),
            json!({ "sub": [canary] }),
        ] {
            if let Err(error) = house.ask_claims(&with(&house.claims(kind), changes)).await {
                let all = format!("{error} {error:?} {} {}", error.detail(), error.public());
                assert!(!all.contains(canary), "{all}");
            }
        }
        for changes in
            [json!({ "kid": canary }), json!({ "typ": canary }), json!({ "alg": canary }), json!({ "crit": [canary] })]
        {
            let header = with(&House::header(&house.es256), changes);
            let error = house.ask(&house.es256.sign(&header, &house.claims(kind))).await.unwrap_err();
            assert!(!format!("{error} {error:?} {}", error.public()).contains(canary));
        }
    }
    assert!(!house.ask(canary).await.unwrap_err().detail().contains(canary));
}

#[tokio::test]
async fn verifying_is_cheap() {
    let house = House::new();
    for kind in BOTH {
        let tokens: Vec<String> = (0..200)
            .map(|n| with(&house.claims(kind), json!({ "jti": n })))
            .map(|claims| house.es256.sign(&House::header(&house.es256), &claims))
            .collect();
        let started = std::time::Instant::now();
        for token in &tokens {
            house.ask(token).await.unwrap();
        }
        let each = started.elapsed() / 200;
        println!("{kind:?} ES256: {each:?}");
        assert!(each < std::time::Duration::from_millis(5), "{each:?}");
    }
}
