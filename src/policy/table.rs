//! `policy test FILE`: tables of cases. Each says who asks for what (in wire form), what is held, and what
//! must come out; a mismatch is shown as "expected … got …" with the rules that made it so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use crate::config::{Problem, request};
use crate::core::id::{AgentId, PersonId, TaskName, TierName};
use crate::core::permission::Permission;

use super::{
    AgentFacts, AssessInput, Assessment, Engine, GrantFacts, On, Outcome, PersonAction, PersonFacts, TaskFacts,
};

/// Largest table, in bytes.
pub const TABLE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most cases in a table.
pub const CASES_MAX: usize = 2_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// `[agents.NAME]`: agents that cases refer to.
    #[serde(default)]
    agents: BTreeMap<String, AgentRow>,
    #[serde(default)]
    case: Vec<Case>,
    #[serde(default)]
    may: Vec<May>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentRow {
    id: AgentId,
    #[serde(default)]
    issuer: Option<String>,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
    #[serde(default)]
    owner: Option<PersonId>,
    #[serde(default)]
    team: Option<String>,
    #[serde(default)]
    groups: BTreeSet<String>,
    #[serde(default)]
    tier_max: Option<TierName>,
}

/// `[[case]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    agent: String,
    want: Vec<toml::Value>,
    /// Held by the agent or its owner's agents, over all tasks.
    #[serde(default)]
    held: Vec<toml::Value>,
    /// Held in this task's tree.
    #[serde(default)]
    tree_holds: Vec<toml::Value>,
    #[serde(default = "default_life")]
    life_secs: u64,
    #[serde(default)]
    depth: u32,
    #[serde(default)]
    recent_requests: u32,
    #[serde(default)]
    intent_labels: BTreeSet<String>,
    expect: Expect,
}

const fn default_life() -> u64 {
    300
}

/// What must come out. Exactly one of `tier` and `deny`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    /// Permitted at this tier.
    #[serde(default)]
    tier: Option<String>,
    /// Denied by this rule.
    #[serde(default)]
    deny: Option<String>,
    /// The life that comes out.
    #[serde(default)]
    life_secs: Option<u64>,
    /// Rules that must be among the reasons.
    #[serde(default)]
    rules: Vec<String>,
}

/// `[[may]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct May {
    name: String,
    person: PersonFacts,
    action: PersonAction,
    /// The grant acted on; absent: the broker.
    #[serde(default)]
    grant: Option<GrantRow>,
    allowed: bool,
    /// A rule that must have decided.
    #[serde(default)]
    rule: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantRow {
    agent: String,
    tier: TierName,
    want: Vec<toml::Value>,
}

/// The outcome of one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseResult {
    /// The case's name.
    pub name: String,
    /// `None`: passed. Else what was expected, what came out, and why.
    pub failure: Option<String>,
}

/// The outcome of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// One for each case, in order.
    pub results: Vec<CaseResult>,
    /// Rules that no case touched.
    pub uncovered: Vec<String>,
}

impl Report {
    /// True if every case passed.
    pub fn passed(&self) -> bool {
        self.results.iter().all(|r| r.failure.is_none())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for r in &self.results {
            match &r.failure {
                None => writeln!(f, "ok      {}", r.name)?,
                Some(why) => writeln!(f, "FAILED  {}\n        {}", r.name, why.replace('\n', "\n        "))?,
            }
        }
        let failed = self.results.iter().filter(|r| r.failure.is_some()).count();
        write!(f, "{} cases, {failed} failed", self.results.len())?;
        if self.uncovered.is_empty() {
            return writeln!(f, "; every rule is covered");
        }
        writeln!(f, "; rules without a case: {}", self.uncovered.join(", "))
    }
}

/// Runs a table. `file` names it in problems. Problems are those of the table itself, not of the policies.
pub fn run(engine: &Engine, file: &str, text: &str) -> Result<Report, Vec<Problem>> {
    let fail = |line: Option<usize>, what: String| {
        vec![Problem { place: line.map_or_else(|| file.to_owned(), |l| format!("{file}:{l}")), what }]
    };
    if text.len() > TABLE_BYTES_MAX {
        return Err(fail(None, format!("larger than {TABLE_BYTES_MAX} bytes")));
    }
    let table: Table = toml::from_str(text).map_err(|e| {
        let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        fail(line, e.message().to_owned())
    })?;
    if table.case.len() + table.may.len() > CASES_MAX {
        return Err(fail(None, format!("more than {CASES_MAX} cases")));
    }
    let mut problems = Vec::new();
    let mut results = Vec::new();
    let mut touched = BTreeSet::new();
    for case in &table.case {
        match input(engine, &table, case) {
            Err(what) => problems.push(Problem { place: format!("{file}: case {:?}", case.name), what }),
            Ok(input) => {
                let got = engine.assess(&input);
                touched.extend(got.reasons.iter().map(|r| r.policy.clone()));
                if let Outcome::Deny { rule, .. } = &got.outcome {
                    touched.insert(rule.clone());
                }
                results.push(CaseResult { name: case.name.clone(), failure: compare(&case.expect, &got) });
            }
        }
    }
    for may in &table.may {
        match grant(engine, &table, may) {
            Err(what) => problems.push(Problem { place: format!("{file}: may {:?}", may.name), what }),
            Ok(grant) => {
                let on = grant.as_ref().map_or(On::Broker, On::Grant);
                let got = engine.may(&may.person, may.action, on);
                touched.extend(got.rules.iter().cloned());
                let right = got.allowed == may.allowed && may.rule.as_ref().is_none_or(|r| got.rules.contains(r));
                let failure = (!right).then(|| {
                    let word = |allowed| if allowed { "allowed" } else { "refused" };
                    let rule = may.rule.as_ref().map(|r| format!(" by {r}")).unwrap_or_default();
                    format!(
                        "expected: {}{rule}\ngot:      {} by {}{}",
                        word(may.allowed),
                        word(got.allowed),
                        got.rules.join(", "),
                        trouble(&got.undecided)
                    )
                });
                results.push(CaseResult { name: may.name.clone(), failure });
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let uncovered = engine.rule_ids().filter(|id| !touched.contains(*id)).map(str::to_owned).collect();
    Ok(Report { results, uncovered })
}

fn agent(table: &Table, name: &str) -> Result<AgentFacts, String> {
    let row = table.agents.get(name).ok_or_else(|| format!("there is no [agents.{name}] in this table; add it"))?;
    let id = row.id.as_str();
    // What the proof would have said, unless the table says otherwise.
    let issuer = match id.strip_prefix("spiffe://") {
        Some(rest) => format!("spiffe://{}", rest.split('/').next().unwrap_or_default()),
        None => id.split('#').next().unwrap_or_default().to_owned(),
    };
    let method = if row.id.is_spiffe() { "x509-svid" } else { "oidc" };
    Ok(AgentFacts {
        id: row.id.clone(),
        issuer: row.issuer.clone().unwrap_or(issuer),
        method: row.method.clone().unwrap_or_else(|| method.to_owned()),
        attributes: row.attributes.clone(),
        owner: row.owner.clone(),
        team: row.team.clone(),
        groups: row.groups.clone(),
        tier_max: row.tier_max.clone(),
    })
}

fn permissions(engine: &Engine, rows: &[toml::Value]) -> Result<Vec<Permission>, String> {
    let one = |row: &toml::Value| {
        let wire: Value = serde_json::to_value(row).map_err(|e| e.to_string())?;
        request::normalise(&engine.catalogue, &wire, &|_| true).map_err(|p| {
            let field = p.field.as_ref().map(|f| format!("{f}: ")).unwrap_or_default();
            format!("{field}{p}")
        })
    };
    rows.iter().map(one).collect()
}

fn input(engine: &Engine, table: &Table, case: &Case) -> Result<AssessInput, String> {
    if case.expect.tier.is_some() == case.expect.deny.is_some() {
        return Err("`expect` needs either `tier` or `deny`".to_owned());
    }
    if let Some(tier) = case.expect.tier.as_ref().filter(|t| !engine.tiers.iter().any(|k| k.name.as_str() == *t)) {
        return Err(format!("`expect` names tier {tier:?}, which there isn't"));
    }
    let name = TaskName::new("table").map_err(|e| e.to_string())?;
    Ok(AssessInput {
        agent: agent(table, &case.agent)?,
        permissions: permissions(engine, &case.want)?,
        task: TaskFacts {
            name,
            depth: case.depth,
            life_secs: case.life_secs,
            recent_requests: case.recent_requests,
            intent_labels: case.intent_labels.clone(),
        },
        tree_holds: permissions(engine, &case.tree_holds)?,
        held: permissions(engine, &case.held)?,
    })
}

fn grant(engine: &Engine, table: &Table, may: &May) -> Result<Option<GrantFacts>, String> {
    let Some(row) = &may.grant else { return Ok(None) };
    let agent = agent(table, &row.agent)?;
    Ok(Some(GrantFacts {
        agent: agent.id,
        owner: agent.owner,
        team: agent.team,
        tier: row.tier.clone(),
        permissions: permissions(engine, &row.want)?,
    }))
}

fn compare(expect: &Expect, got: &Assessment) -> Option<String> {
    let rules: BTreeSet<&str> = got.reasons.iter().map(|r| r.policy.as_str()).collect();
    let missing = expect.rules.iter().any(|r| !rules.contains(r.as_str()));
    let right = match &got.outcome {
        Outcome::Permit { tier, life_secs, .. } => {
            expect.tier.as_deref() == Some(tier.name.as_str()) && expect.life_secs.is_none_or(|l| l == *life_secs)
        }
        Outcome::Deny { rule, .. } => expect.deny.as_ref() == Some(rule),
    };
    if right && !missing {
        return None;
    }
    let mut wanted = match (&expect.tier, &expect.deny) {
        (Some(tier), _) => format!("tier {tier}"),
        (None, deny) => format!("denied by {}", deny.as_deref().unwrap_or("?")),
    };
    if let Some(life) = expect.life_secs {
        wanted = format!("{wanted} for {life} s");
    }
    if !expect.rules.is_empty() {
        wanted = format!("{wanted}, by {}", expect.rules.join(", "));
    }
    let found = match &got.outcome {
        Outcome::Permit { tier, life_secs, .. } => format!("tier {} for {life_secs} s", tier.name),
        Outcome::Deny { rule, reason } => format!("denied by {rule} ({reason})"),
    };
    let by = rules.into_iter().collect::<Vec<_>>().join(", ");
    let by = if by.is_empty() { String::new() } else { format!(", by {by}") };
    Some(format!("expected: {wanted}\ngot:      {found}{by}{}", trouble(&got.undecided)))
}

fn trouble(undecided: &[String]) -> String {
    if undecided.is_empty() { String::new() } else { format!("\nundecided: {}", undecided.join("; ")) }
}
