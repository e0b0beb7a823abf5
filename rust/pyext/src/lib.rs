//! The extension module `rayserve_fast._core`: converts between Python and the data plane, decides nothing.
//!
//! No thread of this crate ever attaches to the interpreter by itself; Rust touches Python only when Python called it.

mod client;
mod proxy;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<client::Client>()?;
    module.add_class::<client::Call>()?;
    module.add_class::<client::Mailbox>()?;
    module.add_class::<proxy::Proxy>()?;
    Ok(())
}
