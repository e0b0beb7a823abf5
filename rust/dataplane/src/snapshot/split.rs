//! Routes and endpoints that several applications answer, as the snapshot has them.

use serde::{Deserialize, Serialize};

/// Several who answer, each its share.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Split {
    /// Who answers.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// What keeps a visitor at one target.
    #[serde(default)]
    pub sticky: Option<Sign>,
    /// What goes to one target whatever its weight; the first that holds wins.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Who gets copies.
    #[serde(default)]
    pub shadows: Vec<Shadow>,
}

/// One who answers for a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The application's name.
    pub name: String,
    /// Its ingress: a key of [`Snapshot::deployments`], which may be missing. It is not ready then.
    pub deployment: String,
    /// Its share, in proportion to the others'.
    pub weight: f64,
}

/// Where a request shows a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// In a header of this name.
    Header(String),
    /// In a cookie of this name.
    Cookie(String),
}

/// Requests that are for one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Where to look.
    #[serde(flatten)]
    pub sign: Sign,
    /// What has to stand there; none: anything.
    #[serde(default)]
    pub value: Option<String>,
    /// The name of one of the targets.
    pub target: String,
}

/// One who gets copies of requests and whose answers nobody reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shadow {
    /// The application's name.
    pub name: String,
    /// Its ingress, as that of a target.
    pub deployment: String,
    /// The share of requests that are copied, from 0 to 1.
    pub share: f64,
}

impl Split {
    /// What is wrong with it, in a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        for (at, Target { name, weight, .. }) in self.targets.iter().enumerate() {
            if !(weight.is_finite() && *weight >= 0.0) {
                return Err(format!("the weight of target {name:?} is {weight}, which is no share"));
            }
            if self.targets[..at].iter().any(|other| other.name == *name) {
                return Err(format!("target {name:?} stands there twice"));
            }
        }
        if let Some(rule) = self.rules.iter().find(|rule| !self.targets.iter().any(|target| target.name == rule.target))
        {
            return Err(format!("a rule names {:?}, which is no target of it", rule.target));
        }
        match self.shadows.iter().find(|shadow| !(0.0..=1.0).contains(&shadow.share)) {
            Some(Shadow { name, share, .. }) => Err(format!("the share of shadow {name:?} is {share}, not 0 to 1")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Snapshot;

    #[test]
    fn a_split_reads_as_documented_and_its_targets_may_be_missing() {
        let json = r#"{"version": [1, 1], "routes": [{"prefix": "/x", "app": "a", "deployment": "", "split": "/x"}],
            "splits": {"/x": {"targets": [{"name": "a", "deployment": "a#I", "weight": 0.9}, {"name": "b", "deployment": "b#B", "weight": 0.1}],
                "sticky": {"cookie": "session"},
                "rules": [{"header": "x-canary", "value": "1", "target": "b"}, {"cookie": "beta", "value": null, "target": "b"}],
                "shadows": [{"name": "c", "deployment": "c#C", "share": 0.1}]}, "endpoint": {}}}"#;
        let snapshot = Snapshot::parse(json.as_bytes()).expect("valid");
        let split = &snapshot.splits["/x"];
        assert_eq!(split.sticky, Some(Sign::Cookie("session".into())));
        assert_eq!((&split.rules[0].sign, split.rules[1].value.as_ref()), (&Sign::Header("x-canary".into()), None));
        assert_eq!(snapshot.splits["endpoint"], Split::default());
        let again = serde_json::to_vec(&snapshot).expect("plain data");
        assert_eq!(Snapshot::parse(&again).expect("valid"), snapshot);
        for (right, wrong, problem) in [
            (
                r#""split": "/x""#,
                r#""split": "/y""#,
                r#"split "/y": route "/x" names it, but the snapshot does not hold it"#,
            ),
            (r#""weight": 0.1"#, r#""weight": -1"#, r#"split "/x": the weight of target "b" is -1, which is no share"#),
            (r#""name": "b""#, r#""name": "a""#, r#"split "/x": target "a" stands there twice"#),
            (r#""target": "b"}]"#, r#""target": "d"}]"#, r#"split "/x": a rule names "d", which is no target of it"#),
            (r#""share": 0.1"#, r#""share": 2"#, r#"split "/x": the share of shadow "c" is 2, not 0 to 1"#),
        ] {
            let refused = Snapshot::parse(json.replace(right, wrong).as_bytes()).expect_err(problem);
            assert_eq!(refused.to_string(), problem);
        }
    }
}
