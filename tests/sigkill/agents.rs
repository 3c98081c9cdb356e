//! Agents: they ask, collect, use and complete, note what they were told, and go on after a restart with what they had
//! begun, under the keys that they had used.

use std::sync::Arc;
use std::time::Duration;

use countersign::core::id::{GrantId, LeaseId, Timestamp};
use countersign::time::{Clock as _, SystemClock};
use serde_json::{Value, json};

use crate::seed::Seed;
use crate::targets::{Kind, Targets};

/// An answer that doesn't come within this doesn't come.
const ANSWER: Duration = Duration::from_secs(15);
/// So close to its end, a credential may be refused or not: lives are counted in whole seconds, rounded down.
const NEAR_END_MS: u64 = 2500;
/// Tries while another call is minting.
const IN_PROGRESS_TRIES: usize = 40;

/// What an agent was told, and therefore must be on record.
#[derive(Debug, Clone, Copy)]
pub enum Ack {
    Granted { grant: GrantId, version: u64 },
    HandedOver { grant: GrantId, lease: LeaseId },
    Over { grant: GrantId },
}

impl Ack {
    pub const fn grant(&self) -> GrantId {
        match self {
            Self::Granted { grant, .. } | Self::HandedOver { grant, .. } | Self::Over { grant } => *grant,
        }
    }
}

/// What an agent does with its grant once it has used it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Complete,
    CompleteTask,
    /// Nothing: its time runs out.
    Expire,
    /// Completes while the credential is being minted.
    Race,
    /// Asks again for everything that it has.
    AskAgain,
    /// Has the credential replaced.
    Replace,
}

/// The broker as one process of it is reached.
pub struct Reach {
    pub base: String,
    pub http: reqwest::Client,
    /// The API that asks about tokens.
    pub api_token: String,
    pub targets: Arc<Targets>,
}

#[derive(Debug, Clone)]
struct Held {
    kind: Kind,
    user: String,
    secret: String,
}

/// One grant, as its agent knows it.
#[derive(Debug, Clone)]
pub struct Story {
    token: String,
    /// Names the task, and begins the keys.
    name: String,
    kinds: Vec<Kind>,
    life_secs: u64,
    plan: Plan,
    id: Option<GrantId>,
    ends_at: Timestamp,
    held: Vec<Held>,
    /// Its credentials were handed over: to somebody, if not to us.
    handed_over: bool,
    /// We asked for others in their place: those may have been ended, and nothing minted yet.
    replaced: bool,
    /// Its end was asked for, by us.
    may_be_over: bool,
    over: bool,
    done: bool,
}

/// What an agent brings home from one life of the broker.
#[derive(Debug, Default)]
pub struct Told {
    pub acks: Vec<Ack>,
    pub wrong: Vec<String>,
    /// Credentials that worked.
    pub used: u64,
}

/// The broker was gone, or couldn't now.
struct Later;
type Step<T> = Result<T, Later>;

struct Answer {
    status: u16,
    json: Value,
}

impl Answer {
    fn problem(&self) -> &str {
        self.json["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default()
    }
}

impl Story {
    pub fn new(name: String, token: String, seed: &mut Seed) -> Self {
        let mut kinds = Kind::ALL.to_vec();
        seed.shuffle(&mut kinds);
        // One of five asks for everything at once: all of it or nothing.
        kinds.truncate(if seed.percent(20) { 3 } else { 1 });
        let plans = [
            Plan::Complete,
            Plan::Complete,
            Plan::CompleteTask,
            Plan::Expire,
            Plan::Race,
            Plan::AskAgain,
            Plan::Replace,
        ];
        let plan = plans[usize::try_from(seed.below(plans.len() as u64)).unwrap()];
        let life_secs = if plan == Plan::Expire { 1 + seed.below(5) } else { 600 };
        Self {
            token,
            name,
            kinds,
            life_secs,
            plan,
            id: None,
            ends_at: Timestamp(0),
            held: Vec::new(),
            handed_over: false,
            replaced: false,
            may_be_over: false,
            over: false,
            done: false,
        }
    }

    pub const fn is_done(&self) -> bool {
        self.done
    }

    /// Goes on as far as the broker lives.
    pub async fn go_on(mut self, reach: Arc<Reach>) -> (Self, Told) {
        let mut told = Told::default();
        let _ = self.steps(&reach, &mut told).await;
        (self, told)
    }

    async fn steps(&mut self, reach: &Reach, told: &mut Told) -> Step<()> {
        if self.over {
            // Once more, in another life of the broker: over is over.
            self.check_over(reach, told).await?;
            self.done = true;
            return Ok(());
        }
        let id = self.ask(reach, told).await?;
        if self.plan == Plan::Race && !self.handed_over && !self.may_be_over {
            let mut racing = self.clone();
            self.may_be_over = true;
            let mut racer = Told::default();
            let (ended, _) = tokio::join!(self.end(reach, told, id), racing.collect(reach, &mut racer, id));
            self.held = racing.held;
            self.handed_over |= racing.handed_over;
            told.acks.append(&mut racer.acks);
            told.wrong.append(&mut racer.wrong);
            ended?;
            return self.check_over(reach, told).await;
        }
        if self.held.is_empty() && !self.may_be_over && !self.collect(reach, told, id).await? {
            self.done = true; // over by itself
            return Ok(());
        }
        self.use_all(reach, told, id).await?;
        match self.plan {
            Plan::Expire => {
                self.done = true;
                return Ok(());
            }
            Plan::AskAgain => self.ask_again(reach, told, id).await?,
            Plan::Replace if !self.may_be_over => {
                self.replace(reach, told, id).await?;
                self.use_all(reach, told, id).await?;
            }
            _ => {}
        }
        self.may_be_over = true;
        self.end(reach, told, id).await?;
        self.check_over(reach, told).await
    }

    async fn post(&self, reach: &Reach, path: &str, key: Option<&str>, body: Value) -> Step<Answer> {
        let mut request = reach.http.post(format!("{}{path}", reach.base)).bearer_auth(&self.token).timeout(ANSWER);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        answer(request.json(&body).send().await).await
    }

    async fn ask(&mut self, reach: &Reach, told: &mut Told) -> Step<GrantId> {
        if let Some(id) = self.id {
            return Ok(id);
        }
        let id = self.request(reach, told).await?;
        self.id = Some(id);
        Ok(id)
    }

    async fn request(&mut self, reach: &Reach, told: &mut Told) -> Step<GrantId> {
        let wants: Vec<Value> = self.kinds.iter().map(|k| k.want()).collect();
        let body = json!({
            "task": self.name, "intent": "because the test says so", "life_secs": self.life_secs,
            "authorization_details": wants,
        });
        let answer = self.post(reach, "/v1/grants", Some(&format!("{}-ask", self.name)), body).await?;
        match answer.status {
            200 => {
                let grant: GrantId = answer.json["id"].as_str().unwrap().parse().unwrap();
                let version = answer.json["version"].as_u64().unwrap();
                told.acks.push(Ack::Granted { grant, version });
                if let Ok(ends_at) = serde_json::from_value(answer.json["ends_at"].clone()) {
                    self.ends_at = ends_at;
                }
                Ok(grant)
            }
            429 | 503 => Err(Later),
            _ => Err(self.strange(told, "a request", &answer)),
        }
    }

    /// False: the grant is over.
    async fn collect(&mut self, reach: &Reach, told: &mut Told, id: GrantId) -> Step<bool> {
        let path = format!("/v1/grants/{id}/credentials");
        for _ in 0..IN_PROGRESS_TRIES {
            let key = format!("{}-collect", self.name);
            let answer = self.post(reach, &path, Some(&key), json!({})).await?;
            match (answer.status, answer.problem()) {
                (200, _) => {
                    if self.handed_over && !self.replaced {
                        told.wrong.push(format!("double mint: {id} was handed over twice under one key"));
                    }
                    self.take(told, id, &answer.json);
                    return Ok(true);
                }
                // The answer was lost with the broker.
                (409, "already-released") => {
                    self.handed_over = true;
                    return self.replace(reach, told, id).await.map(|()| !self.held.is_empty());
                }
                (409, "in-progress") => tokio::time::sleep(Duration::from_millis(25)).await,
                (409, "over") => return Ok(false),
                (429 | 503, _) => return Err(Later),
                _ => return Err(self.strange(told, "a collection", &answer)),
            }
        }
        Err(Later)
    }

    async fn replace(&mut self, reach: &Reach, told: &mut Told, id: GrantId) -> Step<()> {
        // From here on, nobody can say which of them works until the answer is here.
        self.held.clear();
        self.replaced = true;
        let answer =
            self.post(reach, &format!("/v1/grants/{id}/credentials"), None, json!({ "replace": true })).await?;
        match (answer.status, answer.problem()) {
            (200, _) => self.take(told, id, &answer.json),
            (409, "over") => {}
            (409, "in-progress") | (429 | 503, _) => return Err(Later),
            _ => return Err(self.strange(told, "a replacement", &answer)),
        }
        Ok(())
    }

    fn take(&mut self, told: &mut Told, grant: GrantId, json: &Value) {
        self.handed_over = true;
        self.held.clear();
        for one in json["credentials"].as_array().unwrap() {
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            told.acks.push(Ack::HandedOver { grant, lease: text(&one["lease"]).parse().unwrap() });
            let kind = Kind::of_resource(&text(&one["resource"]));
            let (user, secret) = match kind {
                Kind::Postgres => (&one["public"]["user"], &one["secret"]["password"]),
                Kind::OpenBao => (&one["public"]["username"], &one["secret"]["password"]),
                Kind::Token => (&Value::Null, &one["secret"]["token"]),
            };
            self.held.push(Held { kind, user: text(user), secret: text(secret) });
        }
        if self.held.len() != self.kinds.len() {
            told.wrong.push(format!("{grant} has {} permissions and got {}", self.kinds.len(), self.held.len()));
        }
    }

    /// What was handed over works for as long as the grant is in force, whatever other grants and lives of the broker
    /// went by (guarantee 13).
    async fn use_all(&self, reach: &Reach, told: &mut Told, id: GrantId) -> Step<()> {
        for held in &self.held {
            if works(reach, held).await? {
                told.used += 1;
            } else if !self.may_be_over && SystemClock.wall().plus_ms(NEAR_END_MS) < self.ends_at {
                let kind = held.kind.name();
                let (plan, secs) = (self.plan, self.life_secs);
                told.wrong.push(format!(
                    "lost: {id} ({plan:?}, {secs} s) is in force, and its {kind} credential {} is refused",
                    held.user
                ));
            }
        }
        Ok(())
    }

    /// Neither the request nor the collection is done twice.
    async fn ask_again(&mut self, reach: &Reach, told: &mut Told, id: GrantId) -> Step<()> {
        let again = self.request(reach, told).await?;
        if again != id {
            told.wrong.push(format!("double grant: one key gave {id} and {again}"));
        }
        if self.handed_over {
            for key in ["collect", "other"] {
                let key = format!("{}-{key}", self.name);
                let path = format!("/v1/grants/{id}/credentials");
                let answer = self.post(reach, &path, Some(&key), json!({})).await?;
                if answer.status == 200 {
                    told.wrong.push(format!("double mint: {id} was handed over again"));
                }
            }
        }
        Ok(())
    }

    async fn end(&mut self, reach: &Reach, told: &mut Told, id: GrantId) -> Step<()> {
        let path = match self.plan {
            Plan::CompleteTask => format!("/v1/tasks/{}/complete", self.name),
            _ => format!("/v1/grants/{id}/complete"),
        };
        let answer = self.post(reach, &path, None, json!({})).await?;
        match answer.status {
            200 => {
                self.over = true;
                told.acks.push(Ack::Over { grant: id });
                Ok(())
            }
            429 | 503 => Err(Later),
            _ => Err(self.strange(told, "an ending", &answer)),
        }
    }

    /// No token is good once its grant is over.
    async fn check_over(&self, reach: &Reach, told: &mut Told) -> Step<()> {
        for held in self.held.iter().filter(|h| h.kind == Kind::Token) {
            if works(reach, held).await? {
                told.wrong.push(format!("alive: a token of {} is good after its end was told", self.name));
            }
        }
        Ok(())
    }

    fn strange(&self, told: &mut Told, what: &str, answer: &Answer) -> Later {
        told.wrong.push(format!("strange answer to {what} of {}: {} {}", self.name, answer.status, answer.json));
        Later
    }
}

async fn works(reach: &Reach, held: &Held) -> Step<bool> {
    match held.kind {
        Kind::Postgres | Kind::OpenBao => {
            let Ok(session) = reach.targets.db.connect(&held.user, &held.secret).await else { return Ok(false) };
            Ok(session.simple_query("SELECT 1").await.is_ok())
        }
        Kind::Token => {
            let request = reach.http.post(format!("{}/introspect", reach.base)).bearer_auth(&reach.api_token);
            let answer = answer(request.timeout(ANSWER).form(&[("token", &held.secret)]).send().await).await?;
            if answer.status == 200 { Ok(answer.json["active"] == true) } else { Err(Later) }
        }
    }
}

/// Whole, or none.
async fn answer(sent: Result<reqwest::Response, reqwest::Error>) -> Step<Answer> {
    let response = sent.map_err(|_| Later)?;
    let status = response.status().as_u16();
    let json = response.json().await.map_err(|_| Later)?;
    Ok(Answer { status, json })
}
