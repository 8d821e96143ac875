//! HTTP API on a Unix socket, with the paths and JSON of the Cloud Hypervisor API v1, and a client for it.

mod client;
mod connections;
mod http;
mod request;
mod request_stream;
mod routes;
mod server;

pub use client::{ClientError, NO_LIMIT, USUAL_LIMIT, call, metrics};
pub use http::Method;
pub use server::{ApiServer, ServerError, answer_bytes};
