//! Python's view of an HTTP request and its answer.

pub(crate) mod asgi;
pub(crate) mod gather;
pub(crate) mod receive;
pub(crate) mod request;
pub(crate) mod response;
