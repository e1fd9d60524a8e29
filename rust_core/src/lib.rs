//! The numeric core of `sedac_hf`: probes, cascade, replay of exit policies, certification,
//! the decode pass, cycles of drafts over it and the statistics of running models.
//!
//! Plain Rust on slices; the bindings for Python live behind the feature `python`.
//!
//! ```
//! use sedac_core::cascade::{Cascade, Outcome, rules};
//!
//! // One checkpoint: full confidence at risk 0, none at 1, an attempt to exit from one half on.
//! let cascade = Cascade::new(rules(&[1.0], &[1.0], &[0.9], &[0.5])?, vec![])?;
//! let mut confidence = [0.0; 2];
//! let (mut risk, mut normalised, mut try_exit) = ([0.25, 0.75], [0.0; 2], [false; 2]);
//! let mut outcome =
//!     Outcome { risk: &mut risk, normalised: &mut normalised, try_exit: &mut try_exit };
//! let tries = cascade.step_risk(0, &mut confidence, &[true, true], None, &mut outcome)?;
//! assert_eq!((tries, try_exit, normalised), (1, [true, false], [0.75, 0.25]));
//! # Ok::<(), sedac_core::error::CoreError>(())
//! ```

// Tests may unwrap: a panic there is a failed test.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::float_cmp))]

pub mod accumulate;
pub mod async_processor;
pub mod buffer;
pub mod cascade;
pub mod certify;
pub mod draft;
pub mod drift;
pub mod error;
pub mod hidden;
pub mod histogram;
pub mod pass;
pub mod probe;
pub mod project;
pub mod replay;
pub mod telemetry;

#[cfg(feature = "python")]
mod python;
