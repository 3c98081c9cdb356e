//! A reviewer's browser: logs in through the provider's forms, keeps the cookie, sends forms as a browser would, with
//! the token that it read from the page.

use serde_json::{Value, json};

use super::Answer;
use super::oidc_provider::OidcProvider;

/// One signed-in browser.
pub struct Browser {
    pub base: String,
    pub http: reqwest::Client,
    pub cookie: String,
}

/// What the page of a grant offers to decide with.
pub struct Form {
    pub csrf: String,
    pub digest: Option<String>,
    pub typed: Option<String>,
    pub page: String,
}

impl Browser {
    pub async fn log_in(http: &reqwest::Client, base: &str, idp: &OidcProvider, account: &str) -> Self {
        Self::try_log_in(http, base, idp, account).await.unwrap_or_else(|a| panic!("{account}: {}", a.text()))
    }

    /// Everything that a login does; the broker's last answer if it opens no session.
    pub async fn try_log_in(
        http: &reqwest::Client,
        base: &str,
        idp: &OidcProvider,
        account: &str,
    ) -> Result<Self, Answer> {
        let start = Answer::of(http.get(format!("{base}/login/start"))).await;
        assert_eq!(start.status, 303, "{}", start.text());
        let own = cookie(&start, "__Host-countersign-login").expect("a cookie binds the login to its browser");
        let query = idp.log_in(start.header("location"), account).await;
        let back = http.get(format!("{base}/login/callback?{query}")).header("cookie", own);
        let back = Answer::of(back.header("sec-fetch-site", "cross-site")).await;
        match cookie(&back, "__Host-countersign") {
            Some(cookie) if back.status == 303 => Ok(Self { base: base.to_owned(), http: http.clone(), cookie }),
            _ => Err(back),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        let request = self.http.get(format!("{}{path}", self.base)).header("cookie", &self.cookie);
        Answer::of(request.header("sec-fetch-site", "none")).await
    }

    /// A form, as the browser sends it from a page of this broker.
    pub async fn post(&self, path: &str, fields: &[(&str, &str)]) -> Answer {
        self.post_from(path, fields, Some("same-origin"), Some(&self.base)).await
    }

    /// A form with these words about where it comes from.
    pub async fn post_from(
        &self,
        path: &str,
        fields: &[(&str, &str)],
        site: Option<&str>,
        origin: Option<&str>,
    ) -> Answer {
        let mut request = self.http.post(format!("{}{path}", self.base)).header("cookie", &self.cookie).form(fields);
        if let Some(site) = site {
            request = request.header("sec-fetch-site", site);
        }
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        Answer::of(request).await
    }

    /// A session for the command line, as `countersign login` gets it: begun there, confirmed here.
    pub async fn cli_session(&self) -> String {
        let api = |path: &str, body: Value| Answer::of(self.http.post(format!("{}{path}", self.base)).json(&body));
        let begun = api("/api/cli-login", json!({ "from": "ana's laptop" })).await.ok();
        let poll = json!({ "poll": begun["poll"] });
        assert_eq!(api("/api/cli-login/poll", poll.clone()).await.status, 202, "nobody has confirmed it");
        let code = begun["code"].as_str().unwrap();
        let path = format!("/cli/{code}");
        let page = self.get(&path).await.text();
        assert!(page.contains(code) && page.contains("ana&#39;s laptop"), "{page}");
        let csrf = field(&page, "csrf").unwrap();
        let given = self.post(&path, &[("csrf", &csrf), ("code", code), ("answer", "give")]).await;
        assert_eq!(given.status, 303, "{}", given.text());
        let session = api("/api/cli-login/poll", poll.clone()).await.ok()["session"].as_str().unwrap().to_owned();
        api("/api/cli-login/poll", poll).await.problem(410, "login-over");
        session
    }

    /// The page of a grant and what it offers.
    pub async fn form(&self, id: &str) -> Form {
        let page = self.get(&format!("/grants/{id}")).await;
        assert_eq!(page.status, 200, "{}", page.text());
        let page = page.text();
        let csrf = field(&page, "csrf").unwrap_or_else(|| panic!("no token in {page}"));
        let typed = page.split("title=\"Exactly: ").nth(1).and_then(|r| r.split('"').next()).map(str::to_owned);
        Form { csrf, digest: field(&page, "digest"), typed, page }
    }

    /// Any token of this session.
    pub async fn csrf(&self) -> String {
        let page = self.get("/freeze").await.text();
        field(&page, "csrf").unwrap_or_else(|| panic!("no token in {page}"))
    }

    /// Sends a vote with what a page offered.
    pub async fn vote(&self, id: &str, form: &Form, digest: &str, verdict: &str, reason: &str) -> Answer {
        let mut fields = vec![("csrf", form.csrf.as_str()), ("digest", digest), ("verdict", verdict)];
        fields.push(("reason", reason));
        if let Some(typed) = &form.typed {
            fields.push(("typed", typed));
        }
        self.post(&format!("/grants/{id}/vote"), &fields).await
    }

    /// Opens the page, reads it, approves what it shows.
    pub async fn approve(&self, id: &str) -> Answer {
        let form = self.form(id).await;
        let digest = form.digest.clone().unwrap_or_else(|| panic!("nothing to approve in {}", form.page));
        self.vote(id, &form, &digest, "approve", "").await
    }

    /// The same, and it counts.
    pub async fn approved(&self, id: &str) {
        let answer = self.approve(id).await;
        assert_eq!(answer.status, 303, "{}", answer.text());
    }

    pub async fn deny(&self, id: &str, reason: &str) -> Answer {
        let form = self.form(id).await;
        let digest = form.digest.clone().unwrap_or_else(|| panic!("nothing to deny in {}", form.page));
        self.vote(id, &form, &digest, "deny", reason).await
    }
}

/// `name=value` of a cookie that an answer sets.
pub fn cookie(answer: &Answer, name: &str) -> Option<String> {
    answer.headers.get_all("set-cookie").iter().find_map(|v| {
        let (pair, attributes) = v.to_str().ok()?.split_once(';')?;
        let value = pair.strip_prefix(name)?.strip_prefix('=')?;
        assert!(["HttpOnly", "Secure", "SameSite=Lax", "Path=/"].iter().all(|a| attributes.contains(a)), "{v:?}");
        (!value.is_empty()).then(|| pair.to_owned())
    })
}

/// The value of a hidden field, the first of that name.
pub fn field(page: &str, name: &str) -> Option<String> {
    let rest = page.split(&format!("name=\"{name}\" value=\"")).nth(1)?;
    rest.split('"').next().map(str::to_owned)
}
