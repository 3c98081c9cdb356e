//! The style sheet, the one small script and the icon: built in, and served under addresses that name
//! their content, so that they may be cached for ever.

use std::sync::LazyLock;

use crate::core::digest::Digest;

/// Below this address the assets are served.
pub const ASSETS: &str = "/assets/";
/// `Cache-Control` for [`asset`]: the address changes when the content does.
pub const ASSET_CACHE: &str = "public, max-age=31536000, immutable";

struct Asset {
    name: String,
    content_type: &'static str,
    bytes: &'static [u8],
}

impl Asset {
    fn new(stem: &str, ending: &str, content_type: &'static str, bytes: &'static [u8]) -> Self {
        let hash = Digest::of_bytes(bytes).to_string();
        Self { name: format!("{stem}.{}.{ending}", &hash[..16]), content_type, bytes }
    }
}

static ALL: LazyLock<[Asset; 3]> = LazyLock::new(|| {
    [
        Asset::new("console", "css", "text/css; charset=utf-8", include_bytes!("console.css")),
        Asset::new("console", "js", "text/javascript; charset=utf-8", include_bytes!("console.js")),
        Asset::new("mark", "svg", "image/svg+xml", include_bytes!("mark.svg")),
    ]
});

/// Content type and bytes of the asset of that name (what follows [`ASSETS`] in the address).
pub fn asset(name: &str) -> Option<(&'static str, &'static [u8])> {
    ALL.iter().find(|a| a.name == name).map(|a| (a.content_type, a.bytes))
}

/// The style sheet's address.
pub fn css_path() -> String {
    format!("{ASSETS}{}", ALL[0].name)
}

/// The script's address.
pub fn js_path() -> String {
    format!("{ASSETS}{}", ALL[1].name)
}

/// The icon's address.
pub fn icon_path() -> String {
    format!("{ASSETS}{}", ALL[2].name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assets_are_found_by_the_address_that_pages_name() {
        for path in [css_path(), js_path(), icon_path()] {
            let name = path.strip_prefix(ASSETS).unwrap();
            assert!(asset(name).is_some_and(|(_, bytes)| !bytes.is_empty()), "{name}");
        }
        for unknown in ["console.css", "", "../Cargo.toml", "console.0000000000000000.css"] {
            assert!(asset(unknown).is_none(), "{unknown}");
        }
    }
}
