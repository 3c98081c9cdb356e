//! Text that enters SQL: identifiers and literals, quoted by their type alone (regression L7).
//! Not here: values, which go as parameters.

use std::fmt;

/// PostgreSQL cuts longer names silently (NAMEDATALEN − 1), so they are refused.
pub const IDENT_BYTES_MAX: usize = 63;

/// Why a text is no identifier. Never echoes the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a PostgreSQL name has 1 to {IDENT_BYTES_MAX} bytes and no control characters")]
pub struct IdentError;

/// A role, group or database name, exactly as PostgreSQL stores it. Displayed quoted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ident(String);

impl Ident {
    /// Checks and takes the text. Any character but control characters may stand in a name.
    pub fn new(text: &str) -> Result<Self, IdentError> {
        if text.is_empty() || text.len() > IDENT_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(IdentError);
        }
        Ok(Self(text.to_owned()))
    }
    /// The bare text: for parameters and comparisons, never for SQL.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A text literal, for the few statements that take no parameters. Displayed quoted.
#[derive(Debug, Clone, Copy)]
pub struct Literal<'a>(pub &'a str);

impl fmt::Display for Literal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E'{}'", self.0.replace('\\', "\\\\").replace('\'', "''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn l7_identifiers_are_quoted_whatever_they_contain() {
        let hostile = r#"x"; DROP ROLE "postgres"; --"#;
        assert_eq!(Ident::new(hostile).unwrap().to_string(), r#""x""; DROP ROLE ""postgres""; --""#);
        assert_eq!(Literal(r"a'b\").to_string(), r"E'a''b\\'");
    }

    #[test]
    fn names_have_a_limit() {
        assert!(Ident::new(&"a".repeat(IDENT_BYTES_MAX)).is_ok());
        assert_eq!(Ident::new(&"a".repeat(IDENT_BYTES_MAX + 1)), Err(IdentError));
        for bad in ["", "a\0b", "a\nb"] {
            assert_eq!(Ident::new(bad), Err(IdentError), "{bad:?}");
        }
    }
}
