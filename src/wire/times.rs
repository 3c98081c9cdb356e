//! Times and spans as a reviewer reads them: UTC and relative, never one without the other.

use time::OffsetDateTime;
use time::macros::format_description as fd;

use crate::core::id::Timestamp;

/// A moment, told twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// For machines: RFC 3339.
    pub iso: String,
    /// For people: `14:03:22 UTC`, or with the date where it isn't today.
    pub utc: String,
    /// For people: `3 min ago`, `in 4 min`.
    pub relative: String,
}

/// Tells `at`, seen from `now`.
pub fn moment(at: Timestamp, now: Timestamp) -> Moment {
    let relative = match (at.ms_since(now), now.ms_since(at)) {
        (0..=1500, 0..=1500) => "just now".to_owned(),
        (ahead @ 1.., _) => format!("in {}", span(ahead.div_ceil(1000))),
        (_, ago) => format!("{} ago", span(ago / 1000)),
    };
    let (Some(time), Some(today)) = (date(at), date(now)) else {
        return Moment { iso: String::new(), utc: "after the year 9999".to_owned(), relative };
    };
    let says = if time.date() == today.date() {
        time.format(fd!("[hour]:[minute]:[second] UTC"))
    } else if time.year() == today.year() {
        time.format(fd!("[day padding:none] [month repr:short] [hour]:[minute] UTC"))
    } else {
        time.format(fd!("[day padding:none] [month repr:short] [year] [hour]:[minute] UTC"))
    };
    let iso = time.format(fd!("[year]-[month]-[day]T[hour]:[minute]:[second]Z")).unwrap_or_default();
    Moment { iso, utc: says.unwrap_or_default(), relative }
}

/// `time` ends at the year 9999; a later timestamp has no date.
fn date(at: Timestamp) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(i64::try_from(at.secs()).ok()?).ok()
}

/// A span in at most two units: `45 s`, `15 min`, `1 h 30 min`, `2 d 3 h`. Seconds show up to ten minutes.
pub fn span(secs: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let first = UNITS.iter().position(|(size, _)| secs >= *size).unwrap_or(3);
    let (size, unit) = UNITS[first];
    let head = format!("{} {unit}", secs / size);
    match UNITS.get(first + 1) {
        Some((small, name)) if secs % size / small > 0 && secs != 0 && (*small > 1 || secs < 600) => {
            format!("{head} {} {name}", secs % size / small)
        }
        _ => head,
    }
}

/// A span told whole, for what is approved: `15 min`, `15 min 15 s`.
pub fn exact(secs: u64) -> String {
    let parts = [(secs / 86_400, "d"), (secs / 3_600 % 24, "h"), (secs / 60 % 60, "min"), (secs % 60, "s")];
    let said: Vec<_> = parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n} {unit}")).collect();
    if said.is_empty() { "0 s".to_owned() } else { said.join(" ") }
}

/// A span that must not sound shorter than it is (a residual window): rounded up.
pub fn at_most(secs: u64) -> String {
    let step = match secs {
        0..600 => 1,
        600..86_400 => 60,
        _ => 3_600,
    };
    span(secs.div_ceil(step).saturating_mul(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_well() {
        let cases = [
            (0, "0 s"),
            (45, "45 s"),
            (60, "1 min"),
            (252, "4 min 12 s"),
            (900, "15 min"),
            (915, "15 min"),
            (5400, "1 h 30 min"),
            (3601, "1 h"),
            (183_600, "2 d 3 h"),
        ];
        for (secs, expected) in cases {
            assert_eq!(span(secs), expected, "{secs}");
        }
        assert_eq!((exact(900), exact(915), exact(0)), ("15 min".into(), "15 min 15 s".into(), "0 s".into()));
        assert_eq!((exact(90_061), at_most(630)), ("1 d 1 h 1 min 1 s".into(), "11 min".into()));
        assert_eq!(
            (at_most(45), at_most(3_601), at_most(86_401)),
            ("45 s".into(), "1 h 1 min".into(), "1 d 1 h".into())
        );
        assert!(at_most(u64::MAX).contains(" d"));
        assert!(span(u64::MAX).ends_with(" h") || span(u64::MAX).ends_with(" d"));
    }

    #[test]
    fn moments_are_told_twice() {
        let now = Timestamp(1_795_356_400_000); // 2026-11-22T14:06:40Z
        let tell = |at: u64| {
            let m = moment(Timestamp(at), now);
            (m.utc, m.relative)
        };
        assert_eq!(tell(now.0 - 180_000), ("14:03:40 UTC".into(), "3 min ago".into()));
        assert_eq!(tell(now.0 - 3 * 86_400_000), ("19 Nov 14:06 UTC".into(), "3 d ago".into()));
        assert_eq!(tell(now.0 + 700).1, "just now");
        assert_eq!(tell(now.0 + 61_000).1, "in 1 min 1 s");
        assert!(tell(0).0.contains("1 Jan 1970 00:00 UTC"));
        assert_eq!(moment(Timestamp(u64::MAX), now).utc, "after the year 9999");
    }
}
