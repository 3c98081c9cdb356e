//! What every page must keep to, in the browser: WCAG 2.2 A and AA by axe-core, nothing that its CSP stopped, nothing
//! that has to be scrolled sideways, targets of 44 px, nothing focused at load. And a picture of it.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::Chrome;

/// One way of looking at a page.
#[derive(Clone, Copy, Debug)]
pub struct Sight {
    /// Width of the window, in CSS pixels.
    pub width: u32,
    pub height: u32,
    pub dark: bool,
}

const DESK: Sight = Sight { width: 1280, height: 900, dark: false };
const PHONE: Sight = Sight { width: 390, height: 844, dark: false };
/// 1280 px at 400 % zoom (WCAG 1.4.10).
const NARROW: Sight = Sight { width: 320, height: 640, dark: false };
const SIGHTS: [Sight; 5] = [DESK, Sight { dark: true, ..DESK }, PHONE, Sight { dark: true, ..PHONE }, NARROW];

/// Runs axe over the whole page.
const AXE: &str = "
const done = arguments[arguments.length - 1];
const tags = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22a', 'wcag22aa'];
axe.run(document, { runOnly: tags, resultTypes: ['violations'] }).then(
  (r) => done({ checked: r.passes.length, violations: r.violations.flatMap((v) => v.nodes.map((n) =>
    `${v.id}: ${n.failureSummary} ${n.html}`)) }),
  (e) => done({ checked: 0, violations: [String(e)] }));";

/// What is wider than the window: the page itself, or a part that sticks out of it.
const WIDE: &str = "
const wide = document.documentElement.clientWidth, found = [];
if (document.documentElement.scrollWidth > wide) found.push(`the page has ${document.documentElement.scrollWidth} px`);
for (const el of document.querySelectorAll('body *')) {
  const box = el.getBoundingClientRect();
  if (box.width > 1 && box.right > wide + 0.5 && !el.closest('.skip'))
    found.push(`${el.tagName}.${el.className} ends at ${box.right} px`);
}
return found;";

/// What can be clicked and is smaller than a thumb. A link in a line of text is as high as its line (WCAG 2.5.8, inline),
/// and a row's link covers its row.
const SMALL: &str = "
const found = [];
for (const el of document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea, summary')) {
  if (el.closest('.skip') || !el.checkVisibility({ visibilityProperty: true })) continue;
  if (getComputedStyle(el).display === 'inline' && el.parentElement.textContent.trim() !== el.textContent.trim()
      && getComputedStyle(el, '::after').position !== 'absolute') continue;
  const all = getComputedStyle(el, '::after').position === 'absolute' ? el.offsetParent : el;
  const box = all.getBoundingClientRect();
  if (box.width < 44 || box.height < 44) found.push(`${el.outerHTML} is ${box.width} x ${box.height} px`);
}
return found;";

const FOCUSED: &str = "return document.activeElement === document.body ? null : document.activeElement.outerHTML";

/// Where pictures go: `COUNTERSIGN_PAGES`, or `pages` beside what cargo builds.
fn folder() -> PathBuf {
    let built = || Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("pages");
    let folder = std::env::var_os("COUNTERSIGN_PAGES").map_or_else(built, PathBuf::from);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

impl Chrome {
    /// Sees the window like that.
    pub async fn see(&self, sight: Sight) {
        let Sight { width, height, dark } = sight;
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.browser("Emulation.setDeviceMetricsOverride", metrics).await;
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.browser("Emulation.setEmulatedMedia", media).await;
        // Layout and style are those of the new window from here on.
        self.until("the window has that width", &format!("return innerWidth === {width}")).await;
    }

    /// Opens a page in every way of looking at it, takes a picture of each, and gives what is wrong with it.
    pub async fn faults(&self, url: &str, name: &str) -> Vec<String> {
        self.open(url).await;
        self.faults_here(name).await
    }

    /// The same for the page that is open, which must have been opened just now.
    pub async fn faults_here(&self, name: &str) -> Vec<String> {
        let mut faults = Vec::new();
        let mut focused = self.run(FOCUSED).await;
        faults.extend(focused.take().as_str().map(|what| format!("{name}: focused at load: {what}")));
        for sight in SIGHTS {
            self.see(sight).await;
            let shade = if sight.dark { "dark" } else { "light" };
            let at = format!("{name}-{}-{shade}", sight.width);
            let mut found = self.list(WIDE).await;
            found.extend(self.list(SMALL).await);
            std::fs::write(folder().join(format!("{at}.png")), self.picture().await).unwrap();
            faults.extend(found.into_iter().map(|what| format!("{at}: {what}")));
        }
        // What the page itself did, before axe is put into it.
        faults.extend(self.console().await.into_iter().map(|what| format!("{name}: console: {what}")));
        for sight in [DESK, SIGHTS[1], PHONE] {
            self.see(sight).await;
            faults.extend(self.axe().await.into_iter().map(|what| format!("{name} {sight:?}: {what}")));
        }
        self.console().await;
        self.see(DESK).await;
        faults
    }

    async fn list(&self, script: &str) -> Vec<String> {
        serde_json::from_value(self.run(script).await).unwrap()
    }

    async fn axe(&self) -> Vec<String> {
        self.run(&self.axe).await;
        let answer = self.client.execute_async(AXE, Vec::new()).await.unwrap();
        assert!(answer["checked"].as_u64().is_some_and(|n| n > 5) || answer["violations"] != json!([]), "{answer}");
        serde_json::from_value(answer["violations"].clone()).unwrap()
    }

    /// The whole page, as PNG.
    async fn picture(&self) -> Vec<u8> {
        let size = "const e = document.documentElement; return [e.clientWidth, e.scrollHeight]";
        let size = self.run(size).await;
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let taken = self
            .browser("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": true, "clip": clip }))
            .await;
        let Value::String(text) = &taken["data"] else { panic!("no picture: {taken}") };
        BASE64_STANDARD.decode(text).unwrap()
    }
}
