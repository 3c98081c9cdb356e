//! The digest names every part of what is approved: change one leaf, add, drop or swap one, and it is another.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::{Value, json};

use super::uses::{PERMISSIONS, permission, plain};
use crate::core::digest::Digest;
use crate::core::request::Approvable;

fn approvable() -> impl Strategy<Value = Approvable> {
    let permissions = prop::collection::vec(0..PERMISSIONS, 1..4);
    let word = "[a-z \u{e9}\u{1f600}\"\\\\\n]{0,12}";
    (any::<u128>(), permissions, 1u64..1 << 53, 0u64..1 << 53, any::<u8>(), word, any::<bool>()).prop_map(
        |(id, permissions, life, end, approvals, sentence, owned)| {
            let permissions: Vec<_> = permissions.into_iter().map(permission).collect();
            let hash = Digest::of_bytes(sentence.as_bytes());
            let mut value = json!({
                "grant": crate::core::id::GrantId::from_bytes(id.to_be_bytes()),
                "agent": "spiffe://corp/agent/1",
                "chain": ["spiffe://corp/agent/2", "https://idp#3"],
                "life_secs": life,
                "latest_end": end,
                "tier": {"name": "change", "approvals": approvals, "life_secs_max": life, "friction": "high"},
                "targets": {"pg": hash, "kv": hash},
                "revocability": permissions.iter().map(|_| json!({
                    "mode": "new_use_only", "residual_secs": 60, "says": "a minute"
                })).collect::<Vec<_>>(),
                "permissions": permissions,
                "sentence": sentence,
            });
            if owned {
                value["owner"] = json!("ana");
            }
            serde_json::from_value(value).expect("a complete approvable")
        },
    )
}

/// Every place in a JSON value where something stands.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Array(items) => items.iter().enumerate().for_each(|(n, v)| places(v, &format!("{at}/{n}"), all)),
        Value::Object(map) => map.iter().for_each(|(k, v)| places(v, &format!("{at}/{k}"), all)),
        _ => {}
    }
}

/// Other values for this place, as far as one can tell from the value alone.
fn others(value: &Value) -> Vec<Value> {
    match value {
        Value::Number(n) => {
            let n = n.as_u64().unwrap_or(0);
            vec![json!(n ^ 1), json!(n / 2 + 7)]
        }
        Value::String(text) => {
            let mut other: Vec<_> = ["x", " ", "0"].iter().map(|end| json!(format!("{text}{end}"))).collect();
            // Ids, hashes and words from a list keep their form only if a character is exchanged.
            other.extend(["one", "critical", "immediate", "expiry_only"].map(|word| json!(word)));
            for (i, c) in text.char_indices().skip(3).take(24) {
                let swapped = if c == 'a' { 'b' } else { 'a' };
                other.push(json!(format!("{}{swapped}{}", &text[..i], &text[i + c.len_utf8()..])));
            }
            other
        }
        Value::Array(items) if !items.is_empty() => {
            let mut more = items.clone();
            more.push(items[0].clone());
            let mut turned = items.clone();
            turned.rotate_left(1);
            vec![json!(items[1..]), json!(more), json!(turned), json!([])]
        }
        Value::Object(map) => map
            .keys()
            .map(|key| {
                let mut less = map.clone();
                less.remove(key);
                Value::Object(less)
            })
            .collect(),
        _ => Vec::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_part_is_in_the_digest(a in approvable()) {
        let (value, digest) = (json!(a), a.digest().unwrap());
        prop_assert_eq!(Digest::of_bytes(plain(&value).as_bytes()), digest, "another canonical form");
        let mut all = Vec::new();
        places(&value, "", &mut all);
        for place in all {
            let there = value.pointer(&place).unwrap();
            let mut tried = 0;
            for other in others(there).into_iter().filter(|other| other != there) {
                let mut changed = value.clone();
                *changed.pointer_mut(&place).unwrap() = other;
                // Some changes have no meaning (an id of the wrong form): those never become an approvable.
                let Ok(b) = serde_json::from_value::<Approvable>(changed) else { continue };
                // Two spellings of one set are the same thing.
                if b == a { continue }
                tried += 1;
                prop_assert_ne!(b.digest().ok(), Some(digest), "{} does not count", place);
            }
            prop_assert!(tried > 0 || !there.is_string() && !there.is_number(), "{} was not tried", place);
        }
    }
}

#[test]
fn a_number_too_large_for_every_reader_has_no_digest() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut a = approvable().new_tree(&mut runner).unwrap().current();
    a.life_secs = 1 << 53;
    assert!(a.digest().is_err());
}
