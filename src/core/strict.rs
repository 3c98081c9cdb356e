//! Closed by default (guarantee 12) where serde is not: `deny_unknown_fields` does not reach unit
//! variants of an internally tagged enum, which would swallow any field beside their tag.

use serde::{Deserialize, Deserializer};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// For `#[serde(deserialize_with = "no_fields")]` on such a variant: nothing may stand beside the tag.
pub fn no_fields<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    NoFields::deserialize(deserializer).map(|NoFields {}| ())
}
