//! What a proxy is told when it is made. Every option has its default and its documentation in Python; here is none.

use std::{fmt, path::PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// See `ProxyConfig` in Python.
#[derive(Clone, PartialEq)]
#[expect(missing_docs, reason = "documented where the defaults are")]
pub struct Config {
    pub host: String,
    pub port: u16,
    pub root_path: String,
    pub request_timeout_s: Option<f64>,
    pub keep_alive_timeout_s: f64,
    pub max_head_bytes: usize,
    pub max_body_bytes: Option<u64>,
    pub shards: usize,
    pub node_id: String,
    pub token: Vec<u8>,
    pub snapshot_path: Option<PathBuf>,
    pub session_header: String,
    pub prefer_local_node: bool,
    pub forwarded_allow_ips: String,
}

impl fmt::Debug for Config {
    /// Leaves the token out: it must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, root_path, shards, node_id, .. } = self;
        write!(f, "Config({host}:{port}{root_path}, {shards} shards, node {node_id})")
    }
}

/// A field that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("proxy configuration: {field}: {problem}")]
pub struct ConfigError {
    /// Its name, or what stands for the whole value.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl ConfigError {
    fn new(field: &str, problem: impl fmt::Display) -> Self {
        Self { field: field.to_owned(), problem: problem.to_string() }
    }
}

fn take<T: DeserializeOwned>(fields: &mut Map<String, Value>, name: &str) -> Result<T, ConfigError> {
    let value = fields.remove(name).ok_or_else(|| ConfigError::new(name, "is missing"))?;
    serde_json::from_value(value).map_err(|error| ConfigError::new(name, error))
}

fn check(holds: bool, field: &str, problem: &str) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::new(field, problem)) }
}

impl Config {
    /// Reads the JSON value that Python makes.
    ///
    /// # Errors
    /// The first field that is missing, unknown or out of range, by its name.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let mut fields: Map<String, Value> =
            serde_json::from_slice(json).map_err(|error| ConfigError::new("value", error))?;
        let token: String = take(&mut fields, "token")?;
        let config = Self {
            host: take(&mut fields, "host")?,
            port: take(&mut fields, "port")?,
            root_path: take::<String>(&mut fields, "root_path")?.trim_end_matches('/').to_owned(),
            request_timeout_s: take::<Option<f64>>(&mut fields, "request_timeout_s")?.filter(|seconds| *seconds > 0.0),
            keep_alive_timeout_s: take(&mut fields, "keep_alive_timeout_s")?,
            max_head_bytes: take(&mut fields, "max_head_bytes")?,
            max_body_bytes: take(&mut fields, "max_body_bytes")?,
            shards: take(&mut fields, "shards")?,
            node_id: take(&mut fields, "node_id")?,
            token: unhex(&token).ok_or_else(|| ConfigError::new("token", "is not hexadecimal"))?,
            snapshot_path: take(&mut fields, "snapshot_path")?,
            session_header: take(&mut fields, "session_header")?,
            prefer_local_node: take(&mut fields, "prefer_local_node")?,
            forwarded_allow_ips: take(&mut fields, "forwarded_allow_ips")?,
        };
        if let Some(name) = fields.keys().next() {
            return Err(ConfigError::new(name, "is not an option of the proxy"));
        }
        check(!config.token.is_empty(), "token", "is empty")?;
        check((1..=256).contains(&config.shards), "shards", "must be from 1 to 256")?;
        check(config.max_head_bytes >= 1024, "max_head_bytes", "must be at least 1024")?;
        check(config.keep_alive_timeout_s >= 0.0, "keep_alive_timeout_s", "must not be negative")?;
        check(config.root_path.len() < 32 * 1024, "root_path", "is too long")?;
        Ok(config)
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<Vec<_>>>()?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| (pair[0] * 16 + pair[1]) as u8).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn valid() -> Value {
        json!({"host": "127.0.0.1", "port": 0, "root_path": "/api/", "request_timeout_s": null, "shards": 1,
            "keep_alive_timeout_s": 90.0, "max_head_bytes": 65536, "max_body_bytes": null, "node_id": "n",
            "token": "00ff", "snapshot_path": null, "session_header": "x-session-id", "prefer_local_node": true,
            "forwarded_allow_ips": "127.0.0.1"})
    }

    fn parse(value: &Value) -> Result<Config, ConfigError> {
        Config::parse(value.to_string().as_bytes())
    }

    #[test]
    fn a_whole_value_reads() {
        let config = parse(&valid()).expect("valid");
        assert_eq!((config.token.as_slice(), config.root_path.as_str()), (&[0, 255][..], "/api"));
        assert!(!format!("{config:?}").contains("255"), "the token stays out of logs");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (field, value) in [
            ("port", json!(70000)),
            ("token", json!("xyz")),
            ("token", json!("")),
            ("shards", json!(0)),
            ("max_head_bytes", json!(10)),
            ("keep_alive_timeout_s", json!(-1)),
            ("surprise", json!(1)),
        ] {
            let mut config = valid();
            config[field] = value;
            assert_eq!(parse(&config).expect_err("refused").field, field);
        }
        let mut config = valid();
        config.as_object_mut().expect("object").remove("host");
        assert_eq!(parse(&config).expect_err("refused").problem, "is missing");
    }
}
