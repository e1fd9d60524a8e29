//! Which instructions the pass uses: found at run time, or forced by `SEDAC_KERNEL`.

use std::sync::OnceLock;

use super::float::Float;
use super::inputs::Order;
use super::proof;
use crate::error::{CoreError, Result};

/// The variable that forces a kernel.
pub const VARIABLE: &str = "SEDAC_KERNEL";

/// A set of instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// What the target guarantees (SSE2, NEON, ...).
    Scalar,
    /// 256-bit vectors with fused products and conversion of half floats.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same, with products of pairs of brain floats.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// 128-bit vectors with fused products.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// What NEON does, lane by lane.
    #[cfg(test)]
    Narrow,
    /// What AVX-512 with BF16 does, lane by lane.
    #[cfg(test)]
    Wide,
}

/// All names that `SEDAC_KERNEL` may take, on whatever processor.
pub const NAMES: [&str; 5] = ["scalar", "avx2", "avx512", "avx512bf16", "neon"];

impl Kernel {
    /// All that this processor can run and that compute rightly on it, the fastest last. Found out
    /// once in a process.
    #[must_use]
    pub fn available() -> &'static [Self] {
        static FOUND: OnceLock<Vec<Kernel>> = OnceLock::new();
        FOUND.get_or_init(|| Self::detected().into_iter().filter(|&k| proof::holds(k)).collect())
    }

    /// All that this processor has the instructions for.
    fn detected() -> Vec<Self> {
        let mut found = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            found.push(Self::Avx2);
            if is_x86_feature_detected!("avx512f") {
                found.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    found.push(Self::Avx512Bf16);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        found.push(Self::Neon);
        #[cfg(test)]
        found.extend([Self::Narrow, Self::Wide]);
        found.shrink_to_fit();
        found
    }

    /// The kernel that the environment asks for, else the fastest.
    ///
    /// # Errors
    /// [`CoreError::Kernel`] if the name is unknown, the processor lacks the instructions, or they
    /// do not compute rightly on it.
    pub fn chosen() -> Result<Self> {
        let wanted = std::env::var(VARIABLE).ok().filter(|name| !name.is_empty());
        wanted.map_or_else(|| Ok(Self::fastest()), Self::named)
    }

    fn fastest() -> Self {
        Self::available().last().copied().unwrap_or(Self::Scalar)
    }

    pub(super) fn named(wanted: String) -> Result<Self> {
        let named = |kernel: &&Self| kernel.name() == wanted;
        if let Some(kernel) = Self::available().iter().find(named) {
            return Ok(*kernel);
        }
        let problem = if Self::detected().iter().any(|kernel| named(&kernel)) {
            "fails its check against the scalar kernel here"
        } else if NAMES.contains(&wanted.as_str()) {
            "this processor cannot run"
        } else {
            "is not known"
        };
        let names: Vec<_> = Self::available().iter().map(|kernel| kernel.name()).collect();
        Err(CoreError::Kernel { found: wanted, problem, available: names.join(", ") })
    }

    /// Its name, as `SEDAC_KERNEL` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512bf16",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(test)]
            Self::Narrow => "narrow",
            #[cfg(test)]
            Self::Wide => "wide",
        }
    }

    /// How it wants the inputs of a product with numbers of this type.
    pub(super) fn order(self, float: Float) -> Order {
        match (self, float) {
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512Bf16, Float::Bf16) => Order::Brain,
            #[cfg(test)]
            (Self::Wide, Float::Bf16) => Order::Brain,
            (_, Float::Bf16) => Order::Split,
            (_, Float::F32 | Float::F16) => Order::Plain,
        }
    }
}
