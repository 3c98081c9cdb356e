//! How the configuration names claims and attributes. How a path reaches into verified claims is `identity/claims.rs`.

/// Longest claim path, in bytes.
pub const PATH_BYTES_MAX: usize = 256;
/// Longest name of an attribute, in bytes.
pub const ATTRIBUTE_NAME_BYTES_MAX: usize = 64;

/// The names along a path: `a.b.c`, or a JSON pointer (RFC 6901) where names hold dots: `/kubernetes.io/namespace`.
pub fn segments(text: &str) -> Result<Vec<String>, String> {
    let segments: Vec<String> = match text.strip_prefix('/') {
        Some(pointer) => pointer.split('/').map(|s| s.replace("~1", "/").replace("~0", "~")).collect(),
        None => text.split('.').map(str::to_owned).collect(),
    };
    if text.len() > PATH_BYTES_MAX || segments.iter().any(String::is_empty) {
        return Err(format!(
            "a claim path must be like `a.b` or `/kubernetes.io/pod/name`, up to {PATH_BYTES_MAX} bytes"
        ));
    }
    Ok(segments)
}

/// Checks the name under which policies see an attribute.
pub fn check_attribute(name: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > ATTRIBUTE_NAME_BYTES_MAX || !name.bytes().all(plain) {
        return Err(format!(
            "an attribute's name must be 1 to {ATTRIBUTE_NAME_BYTES_MAX} lower-case letters, digits or `_`"
        ));
    }
    Ok(())
}
