//! Where a login may lead back to: pages whose links are sent around, and nothing else. The browser keeps the path
//! meanwhile, and it is checked again when it comes back.

use crate::core::id::GrantId;

use super::cli_login::is_code;

/// The path, if it is one of those.
pub fn checked(path: &str) -> Option<&str> {
    let fine = match path.strip_prefix('/').and_then(|p| p.split_once('/')) {
        Some(("grants", id)) => id.parse::<GrantId>().is_ok(),
        Some(("cli", code)) => is_code(code),
        _ => false,
    };
    fine.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::checked;
    use crate::core::id::GrantId;

    #[test]
    fn only_a_grant_and_a_code() {
        let grant = format!("/grants/{}", GrantId::from_bytes([7; 16]));
        for good in [grant.as_str(), "/cli/BCDF-GHJK"] {
            assert_eq!(checked(good), Some(good));
        }
        let with = |before: &str, after: &str| format!("{before}{grant}{after}");
        for bad in [
            with("https://evil.example", ""),
            with("//evil.example", ""),
            with("/", ""),
            with("\\", ""),
            with("/.", ""),
            with("", "/"),
            with("", "/vote"),
            with("", "?x=1"),
            with("", "#x"),
            with("", "\r\nset-cookie: x=1"),
            with("", ";"),
            "//evil.example/cli/BCDF-GHJK".to_owned(),
            "/cli//evil.example".to_owned(),
            "/cli/BCDF-GHJK/x".to_owned(),
            "/cli/bcdf-ghjk".to_owned(),
            "/cli/".to_owned(),
            "/grants/".to_owned(),
            "/freeze".to_owned(),
            "/".to_owned(),
            String::new(),
        ] {
            assert_eq!(checked(&bad), None, "{bad:?}");
        }
    }
}
