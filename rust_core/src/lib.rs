//! The numeric core of `sedac_hf`: probes, cascade, replay of exit policies and certification.
//!
//! Plain Rust on slices; the bindings for Python live behind the feature `python`.

// Tests may unwrap: a panic there is a failed test.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::float_cmp))]

pub mod accumulate;
pub mod cascade;
pub mod certify;
pub mod error;
pub mod hidden;
pub mod probe;
pub mod project;
pub mod replay;

#[cfg(feature = "python")]
mod python;
