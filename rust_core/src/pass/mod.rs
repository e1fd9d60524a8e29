//! The decode pass of a decoder of the Llama recipe: a few tokens through its layers, with weights
//! read where another library keeps them and K/V of its own.
//!
//! Whatever tokens share a call, each token's result is the same bits: every sum runs in an order
//! that depends on the token's own past alone.

pub mod activation;
pub mod attention;
pub mod cache;
pub mod dot;
pub mod float;
pub mod heads;
pub mod kernel;
pub mod lanes;
pub mod layer;
pub mod matrix;
pub mod norm;
pub mod output;
mod panel;
mod run;
pub mod shared;
pub mod slots;
pub mod softmax;
pub mod stack;
pub mod team;
pub mod threads;

#[cfg(test)]
mod tests;
