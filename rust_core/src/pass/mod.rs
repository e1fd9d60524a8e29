//! The decode pass of a decoder of the Llama recipe: a few tokens through its layers, with weights
//! read where another library keeps them and K/V of its own.
//!
//! Whatever tokens share a call, each token's result is the same bits: every sum runs in an order
//! that depends on the token's own past alone.

pub mod activation;
mod attend;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod cache;
pub mod dot;
pub mod embedding;
pub mod float;
pub mod heads;
pub mod inputs;
mod instructions;
mod join;
pub mod kernel;
pub mod lanes;
pub mod layer;
pub mod matrix;
mod multiply;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod norm;
pub mod output;
mod panel;
mod proof;
pub mod rank;
mod run;
pub mod shared;
pub mod slots;
pub mod softmax;
pub mod stack;
pub mod team;
pub mod threads;
mod widths;

#[cfg(test)]
mod tests;
