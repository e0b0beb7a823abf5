//! The extension module `rayserve_fast._core`: converts between Python and the data plane, decides nothing.
//!
//! No thread of this crate ever attaches to the interpreter by itself; Rust touches Python only when Python called it.

mod awaited;
mod batcher;
mod client;
mod convert;
mod http;
mod lock;
mod plain;
mod proxy;
mod socket;
mod value;
mod worker;

use pyo3::prelude::*;

/// Measured against glibc's: 4 % fewer instructions for a relayed request, and no page faults for large bodies, whose
/// buffers glibc gives back to the system and fetches again (up to 100 faults a MiB).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<batcher::Batcher>()?;
    module.add_class::<batcher::Ticket>()?;
    module.add_class::<client::Client>()?;
    module.add_class::<client::Callee>()?;
    module.add_class::<client::Call>()?;
    module.add_class::<client::Mailbox>()?;
    module.add_class::<client::Chooser>()?;
    module.add_class::<client::Reservation>()?;
    module.add_class::<proxy::Proxy>()?;
    module.add_function(wrap_pyfunction!(proxy::check_snapshot, module)?)?;
    module.add_class::<worker::Worker>()?;
    module.add_class::<http::request::RequestHead>()?;
    module.add_class::<http::request::CallHead>()?;
    module.add_function(wrap_pyfunction!(http::request::head_parts, module)?)?;
    module.add_function(wrap_pyfunction!(http::request::check_pattern, module)?)?;
    Ok(())
}
