//! `revoke --force-absent`: an operator attests that a target no longer exists. What it did, and what it left, is told
//! lease by lease.

use crate::client::ReviewerClient;
use crate::core::id::{GrantId, LeaseId, ResourceName};
use crate::wire::reviewer::{AttestOf, AttestResult};

use super::CliError;
use super::term::{Look, print, print_json, safe};

/// What is meant.
pub fn of(grant: Option<GrantId>, lease: Option<LeaseId>, target: Option<ResourceName>) -> Result<AttestOf, CliError> {
    lease
        .map(AttestOf::Lease)
        .or(target.map(AttestOf::Target))
        .or(grant.map(AttestOf::Grant))
        .ok_or_else(|| CliError::said("--force-absent needs a GRANT, --lease or --target"))
}

/// Attests, and tells what became of each.
pub async fn attest(client: &ReviewerClient, of: AttestOf, reason: String, json: bool) -> Result<i32, CliError> {
    let result = client.attest_absent(of, reason).await?;
    if json {
        print_json(&result)?;
    } else {
        print(&told(Look::of_stdout(), &result))?;
    }
    Ok(0)
}

fn told(look: Look, result: &AttestResult) -> String {
    let mut out =
        format!("{} recorded as absent by your word, without proof\n", look.bold(&count(result.attested.len())));
    for one in &result.attested {
        out.push_str(&format!("  {} of {} at {}\n", one.lease, one.grant, safe(one.target.as_str())));
    }
    if !result.left.is_empty() {
        out.push_str(&format!("{} left as before:\n", look.bold(&count(result.left.len()))));
        for one in &result.left {
            let why = one.why.as_deref().unwrap_or("not said");
            out.push_str(&format!("  {} of {}: {}\n", one.lease, one.grant, safe(why)));
        }
    }
    out
}

fn count(n: usize) -> String {
    if n == 1 { "1 credential".to_owned() } else { format!("{n} credentials") }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::reviewer::RevokeArgs;
    use crate::wire::reviewer::AttestedLease;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        _revoke: RevokeArgs,
    }

    #[test]
    fn one_thing_is_named_and_only_with_the_flag() {
        Line::command().debug_assert();
        let (grant, lease) = (GrantId::from_bytes([1; 16]).to_string(), LeaseId::from_bytes([2; 16]).to_string());
        let line = |args: &[&str]| Line::try_parse_from(["revoke", "--reason", "x"].iter().chain(args)).map(|_| ());
        for good in [
            &[grant.as_str()][..],
            &[&grant, "--force-absent"],
            &["--force-absent", "--lease", &lease],
            &["--force-absent", "--target", "db"],
        ] {
            line(good).unwrap();
        }
        for bad in [
            &[][..],
            &["--force-absent"],
            &["--target", "db"],
            &["--force-absent", "--target", "db", "--lease", &lease],
            &[&grant, "--force-absent", "--target", "db"],
            &[&grant, "--force-absent", "--wait"],
        ] {
            assert!(line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn it_is_never_called_a_proof() {
        let one = |why: Option<&str>| AttestedLease {
            grant: GrantId::from_bytes([1; 16]),
            lease: LeaseId::from_bytes([2; 16]),
            target: "pg-old".parse().unwrap(),
            why: why.map(str::to_owned),
        };
        let text =
            told(Look::PLAIN, &AttestResult { attested: vec![one(None)], left: vec![one(Some("not tried\u{7}"))] });
        for part in ["1 credential recorded", "without proof", "at pg-old", "left as before", "not tried<U+0007>"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
