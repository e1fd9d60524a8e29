//! Drafts and their verification: trees of likely continuations, and whole greedy cycles over the
//! decode pass, from the drafts to the tokens that a row is given.

mod call;
pub mod cycle;
mod grow;
pub mod lookup;
pub mod model;
pub mod plan;
pub mod rows;
pub mod tree;

#[cfg(test)]
mod tests;
