//! Why a request gets no answer from its handler, and everything that follows from it.
//!
//! The tables of this file (whose fault, retry, HTTP status, stable code, text) are the whole policy: nothing else in the
//! data plane decides what a failure becomes. Texts are those that Ray Serve's users know.

use std::borrow::Cow;

use crate::snapshot::{Backpressure, Deployment};

/// A request's failure.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The client's bytes are not a request that this proxy can take.
    #[error("request cannot be understood")]
    Malformed,
    /// No route matches.
    #[error("no route matches {path:?}")]
    NotFound {
        /// Decoded, with the root path in front.
        path: String,
    },
    /// The route does not take the request's method.
    #[error("method {method} is not among {allowed:?}")]
    Method {
        /// The request's.
        method: String,
        /// Those of the route.
        allowed: Vec<String>,
    },
    /// The deadline passed.
    #[error("request {request_id} timed out after {seconds:?} s")]
    Deadline {
        /// The request's id.
        request_id: String,
        /// What was allowed.
        seconds: f64,
    },
    /// The body is larger than configured.
    #[error("request body is above the limit of {limit} bytes")]
    BodyTooLarge {
        /// The configured limit.
        limit: u64,
    },
    /// The client went away.
    #[error("client disconnected")]
    Disconnected,
    /// The queue is full.
    #[error("queue is full: {queued} of {limit} requests wait")]
    Backpressure {
        /// Waiting requests.
        queued: usize,
        /// `max_queued_requests`.
        limit: usize,
        /// How the deployment wants it said.
        policy: Backpressure,
    },
    /// Nothing serves and nothing will.
    #[error("{0}")]
    Unavailable(String),
    /// The deployment was deleted before the request began.
    #[error("{0}")]
    Deleted(String),
    /// The replica has not begun the request.
    #[error("replica did not begin the request")]
    NotBegun,
    /// The replica died with the request begun.
    #[error("replica died while it handled the request")]
    Died,
    /// The user's code raised before its response began.
    #[error("handler raised an exception")]
    User,
    /// The user's code raised after its response began.
    #[error("handler raised an exception after its response had begun")]
    Aborted,
    /// This project's fault.
    #[error("internal error: {0}")]
    Internal(Cow<'static, str>),
    /// WebSocket has no implementation yet.
    #[error("WebSocket is not supported")]
    WebSocket,
}

/// Whose fault a failure is, as metrics and logs count it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The client's.
    Client,
    /// The user's code or its configuration.
    User,
    /// This project's or the machine's.
    Service,
}

/// Whether the same request may be sent again by the data plane itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// No.
    Never,
    /// Yes, anywhere: nothing has run.
    Elsewhere,
    /// Yes, at the deployment to which its route leads by now.
    Reroute,
    /// Once, if the method is idempotent, the deployment allows it and the client has seen nothing.
    Idempotent,
}

impl Error {
    /// The refusal of those who wait at a deployment that the newest snapshot does not hold.
    pub fn deleted(Deployment { name, app, .. }: &Deployment) -> Self {
        Self::Deleted(format!("Deployment(name='{name}', app='{app}') is unavailable because it was deleted."))
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Malformed
            | Self::NotFound { .. }
            | Self::Method { .. }
            | Self::BodyTooLarge { .. }
            | Self::Disconnected
            | Self::WebSocket => Blame::Client,
            Self::Unavailable(_) | Self::Deleted(_) | Self::User | Self::Aborted => Blame::User,
            Self::Deadline { .. } | Self::Backpressure { .. } | Self::NotBegun | Self::Died | Self::Internal(_) => {
                Blame::Service
            }
        }
    }

    /// Whether the data plane may send the request again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::NotBegun => Retry::Elsewhere,
            Self::Deleted(_) => Retry::Reroute,
            Self::Died => Retry::Idempotent,
            _ => Retry::Never,
        }
    }

    /// The HTTP status; 499 reaches only a client that has ended its own side and goes on reading.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::NotFound { .. } => 404,
            Self::Method { .. } => 405,
            Self::Deadline { .. } => 408,
            Self::BodyTooLarge { .. } => 413,
            Self::Disconnected => 499,
            Self::NotBegun | Self::Died | Self::User | Self::Aborted | Self::Internal(_) => 500,
            Self::WebSocket => 501,
            Self::Unavailable(_) | Self::Deleted(_) => 503,
            Self::Backpressure { policy, .. } => policy.status_code,
        }
    }

    /// A name for metrics and logs that never changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NotFound { .. } => "not_found",
            Self::Method { .. } => "method_not_allowed",
            Self::Deadline { .. } => "deadline",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::Disconnected => "disconnected",
            Self::Backpressure { .. } => "backpressure",
            Self::Unavailable(_) => "unavailable",
            Self::Deleted(_) => "deleted",
            Self::NotBegun => "not_begun",
            Self::Died => "replica_died",
            Self::User => "user",
            Self::Aborted => "aborted",
            Self::Internal(_) => "internal",
            Self::WebSocket => "websocket",
        }
    }

    /// The response's body.
    pub fn text(&self) -> Cow<'static, str> {
        match self {
            Self::Malformed => "Invalid HTTP request received.".into(),
            Self::NotFound { path } => {
                format!("Path '{path}' not found. Ping http://.../-/routes for available routes.").into()
            }
            Self::Method { method, allowed } => {
                let allowed = allowed.join("', '");
                format!("Methods {method} not allowed. Available HTTP methods are ['{allowed}'].").into()
            }
            Self::Deadline { request_id, seconds } => {
                format!("Request {request_id} timed out after {seconds:?}s.").into()
            }
            Self::BodyTooLarge { limit } => format!("Request body is larger than {limit} bytes.").into(),
            Self::Disconnected => "Client disconnected.".into(),
            Self::Backpressure { queued, limit, .. } => format!(
                "Request dropped due to backpressure (num_queued_requests={queued}, max_queued_requests={limit})."
            )
            .into(),
            Self::Unavailable(sentence) | Self::Deleted(sentence) => sentence.clone().into(),
            Self::NotBegun | Self::Died | Self::User | Self::Aborted | Self::Internal(_) => {
                "Internal Server Error".into()
            }
            Self::WebSocket => "WebSocket connections are not supported by this version.".into(),
        }
    }

    /// Whole seconds for `Retry-After`.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            #[expect(clippy::cast_sign_loss, reason = "a negative or absurd number saturates")]
            Self::Backpressure { policy, .. } => policy.retry_after_s.map(|seconds| seconds.ceil() as u64),
            _ => None,
        }
    }

    /// The value of `Allow`.
    pub fn allow(&self) -> Option<String> {
        match self {
            Self::Method { allowed, .. } => Some(allowed.join(", ")),
            _ => None,
        }
    }

    /// Whether the body is declared as text; Ray Serve leaves the type of a raising handler's 500 out.
    pub fn typed(&self) -> bool {
        !matches!(self, Self::User)
    }

    /// Whether the client's connection ends with the answer.
    pub fn closes(&self) -> bool {
        matches!(self, Self::Malformed | Self::BodyTooLarge { .. } | Self::NotBegun | Self::Died | Self::Internal(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backpressure(status_code: u16, retry_after_s: Option<f64>) -> Error {
        Error::Backpressure { queued: 7, limit: 5, policy: Backpressure { status_code, retry_after_s } }
    }

    /// The table of the reference's documentation, one row a variant: status, code, blame, retry, body.
    #[test]
    fn every_failure_follows_the_documented_table() {
        use Blame::{Client, Service, User};
        use Retry::{Elsewhere, Idempotent, Never, Reroute};
        let path = "/a b".to_owned();
        let deadline = Error::Deadline { request_id: "r".into(), seconds: 2.0 };
        let dropped = "Request dropped due to backpressure (num_queued_requests=7, max_queued_requests=5).";
        let ise = "Internal Server Error";
        let table: [(Error, u16, &str, Blame, Retry, &str); 16] = [
            (Error::Malformed, 400, "malformed", Client, Never, "Invalid HTTP request received."),
            (
                Error::NotFound { path },
                404,
                "not_found",
                Client,
                Never,
                "Path '/a b' not found. Ping http://.../-/routes for available routes.",
            ),
            (
                Error::Method { method: "PUT".into(), allowed: vec!["GET".into(), "POST".into()] },
                405,
                "method_not_allowed",
                Client,
                Never,
                "Methods PUT not allowed. Available HTTP methods are ['GET', 'POST'].",
            ),
            (deadline, 408, "deadline", Service, Never, "Request r timed out after 2.0s."),
            (
                Error::BodyTooLarge { limit: 9 },
                413,
                "body_too_large",
                Client,
                Never,
                "Request body is larger than 9 bytes.",
            ),
            (Error::Disconnected, 499, "disconnected", Client, Never, "Client disconnected."),
            (backpressure(503, None), 503, "backpressure", Service, Never, dropped),
            (backpressure(429, Some(1.2)), 429, "backpressure", Service, Never, dropped),
            (Error::Unavailable("It failed.".into()), 503, "unavailable", User, Never, "It failed."),
            (Error::Deleted("It was deleted.".into()), 503, "deleted", User, Reroute, "It was deleted."),
            (Error::NotBegun, 500, "not_begun", Service, Elsewhere, ise),
            (Error::Died, 500, "replica_died", Service, Idempotent, ise),
            (Error::User, 500, "user", User, Never, ise),
            (Error::Aborted, 500, "aborted", User, Never, ise),
            (Error::Internal("x".into()), 500, "internal", Service, Never, ise),
            (
                Error::WebSocket,
                501,
                "websocket",
                Client,
                Never,
                "WebSocket connections are not supported by this version.",
            ),
        ];
        for (error, status, code, blame, retry, text) in table {
            assert_eq!(
                (error.status(), error.code(), error.blame(), error.retry(), &*error.text()),
                (status, code, blame, retry, text)
            );
        }
    }

    #[test]
    fn retry_after_is_rounded_up_to_whole_seconds() {
        assert_eq!(backpressure(429, Some(1.2)).retry_after(), Some(2));
        assert_eq!(backpressure(429, Some(0.0)).retry_after(), Some(0));
        assert_eq!(backpressure(503, None).retry_after(), None);
    }

    #[test]
    fn seconds_read_as_python_writes_them() {
        for (seconds, text) in [(1.0, "1.0s"), (0.5, "0.5s"), (1e16, "1e16s")] {
            let error = Error::Deadline { request_id: "r".into(), seconds };
            assert!(error.text().ends_with(&format!("{text}.")), "{}", error.text());
        }
    }

    #[test]
    fn a_deleted_deployment_is_named() {
        let deployment: Deployment =
            serde_json::from_str(r#"{"app": "a", "name": "D", "max_ongoing_requests": 1}"#).expect("valid");
        assert_eq!(
            Error::deleted(&deployment).text(),
            "Deployment(name='D', app='a') is unavailable because it was deleted."
        );
    }
}
