//! The kill switch: choose what, see the count, type a word. Two steps, both POST.

use askama::Template;
use serde::Deserialize;

use crate::core::event::Selector;
use crate::core::id::{AgentId, PersonId, ResourceName, TaskKey, TaskName};
use crate::core::vote::REASON_CHARS_MAX;
use crate::wire::reviewer::{FreezeResult, FreezeView};

use super::look;
use super::queue::{Frozen, freezes};
use super::visible::visible_line;
use super::{Chrome, page};

/// What must be typed to freeze.
pub const FREEZE_WORD: &str = "freeze";
/// The choices: value, label.
const KINDS: [(&str, &str); 7] = [
    ("agent", "One agent"),
    ("owner", "All agents of one person"),
    ("resource", "One resource"),
    ("target", "One target, with all its resources"),
    ("task_name", "All tasks of one name"),
    ("task", "One task of one agent"),
    ("all", "Everything"),
];
/// Grants that are named in the count.
const GRANTS_SHOWN_MAX: usize = 50;
/// Longest text that is put back into a field.
const FIELD_CHARS_MAX: usize = 2048;

/// The fields of the form, as the browser sends them (POST), or as a link fills them in (GET).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct FreezeForm {
    /// From the page.
    pub csrf: String,
    /// `all`, `agent`, `owner`, `resource`, `target`, `task_name`, `task`.
    pub kind: String,
    /// The name of what is frozen.
    pub value: String,
    /// For `task`: the agent that named it.
    pub agent: String,
    /// Why.
    pub reason: String,
    /// `count` or `confirm`.
    pub step: String,
    /// With `confirm`: [`FREEZE_WORD`].
    pub typed: String,
}

impl FreezeForm {
    /// What is to be frozen. The error says which field is wrong, without echoing it.
    pub fn selector(&self) -> Result<Selector, String> {
        let value = self.value.trim();
        let agent = || AgentId::new(self.agent.trim()).map_err(|e| format!("The agent that named the task: {e}."));
        let task = || TaskName::new(value).map_err(|e| format!("{e}."));
        let resource = || ResourceName::new(value).map_err(|e| format!("{e}."));
        match self.kind.as_str() {
            "all" => Ok(Selector::All),
            "agent" => AgentId::new(value).map(Selector::Agent).map_err(|e| format!("{e}.")),
            "owner" => PersonId::new(value).map(Selector::Owner).map_err(|e| format!("{e}.")),
            "resource" => resource().map(Selector::Resource),
            "target" => resource().map(Selector::Target),
            "task_name" => task().map(Selector::TaskName),
            "task" => Ok(Selector::Task(TaskKey { agent: agent()?, task: task()? })),
            _ => Err("Choose what to freeze.".to_owned()),
        }
    }

    /// True if the word was typed.
    pub fn confirmed(&self) -> bool {
        self.step == "confirm" && self.typed.trim() == FREEZE_WORD
    }
}

/// What the freeze page shows.
#[derive(Debug, Default)]
pub struct FreezePage<'a> {
    /// What was filled in so far.
    pub form: FreezeForm,
    /// The count, once asked for (a dry run).
    pub count: Option<FreezeResult>,
    /// Freezes that hold.
    pub freezes: &'a [FreezeView],
    /// What happened, or what is wrong.
    pub notice: Option<String>,
    /// False: the viewer may look, not freeze.
    pub may_freeze: bool,
}

/// The freeze page.
pub fn freeze(data: &FreezePage<'_>, chrome: &Chrome) -> String {
    let field = |text: &str| text.chars().take(FIELD_CHARS_MAX).collect::<String>();
    let covers = data.form.selector().ok().map(|s| look::selector(&s));
    page(&FreezeTemplate {
        chrome,
        kind: visible_line(&data.form.kind),
        value: field(&data.form.value),
        agent: field(&data.form.agent),
        reason: field(&data.form.reason),
        covers: covers.unwrap_or_default(),
        count: data.count.as_ref().map(|c| Count {
            grants: c.grants.len(),
            named: c.grants.iter().take(GRANTS_SHOWN_MAX).map(ToString::to_string).collect(),
        }),
        freezes: freezes(data.freezes, chrome.now),
        notice: data.notice.as_deref().map(visible_line),
        may_freeze: data.may_freeze,
        word: FREEZE_WORD,
        reason_chars_max: REASON_CHARS_MAX,
    })
}

struct Count {
    grants: usize,
    named: Vec<String>,
}

#[derive(Template)]
#[template(path = "freeze.html")]
struct FreezeTemplate<'a> {
    chrome: &'a Chrome,
    kind: String,
    value: String,
    agent: String,
    reason: String,
    covers: String,
    count: Option<Count>,
    freezes: Vec<Frozen>,
    notice: Option<String>,
    may_freeze: bool,
    word: &'static str,
    reason_chars_max: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(kind: &str, value: &str, agent: &str) -> FreezeForm {
        FreezeForm { kind: kind.into(), value: value.into(), agent: agent.into(), ..FreezeForm::default() }
    }

    #[test]
    fn fields_become_a_selector_or_say_what_is_wrong() {
        let id = "spiffe://corp.example/ci";
        assert_eq!(form("all", "", "").selector(), Ok(Selector::All));
        assert_eq!(form("agent", &format!(" {id} "), "").selector(), Ok(Selector::Agent(AgentId::new(id).unwrap())));
        assert!(matches!(form("task", "t-1", id).selector(), Ok(Selector::Task(_))));
        for (kind, value, agent) in
            [("", "x", ""), ("everything", "", ""), ("agent", "nobody", ""), ("owner", "", ""), ("task", "t", "nobody")]
        {
            let why = form(kind, value, agent).selector().unwrap_err();
            assert!(!why.contains("nobody"), "{why}");
        }
    }

    #[test]
    fn the_word_must_be_typed() {
        let typed =
            |step: &str, typed: &str| FreezeForm { step: step.into(), typed: typed.into(), ..FreezeForm::default() };
        assert!(typed("confirm", " freeze ").confirmed());
        for (step, word) in [("count", "freeze"), ("confirm", ""), ("confirm", "Freeze!"), ("", "freeze")] {
            assert!(!typed(step, word).confirmed());
        }
    }
}
