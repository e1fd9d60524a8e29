//! Which instructions the pass uses: found at run time, or forced by `SEDAC_KERNEL`.

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
}

impl Kernel {
    /// All that this processor can run, the fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            found.push(Self::Avx2);
        }
        found.shrink_to_fit();
        found
    }

    /// The kernel that the environment asks for, else the fastest.
    ///
    /// # Errors
    /// [`CoreError::Kernel`] if the name is unknown or the processor lacks the instructions.
    pub fn chosen() -> Result<Self> {
        let available = Self::available();
        let Some(wanted) = std::env::var(VARIABLE).ok().filter(|name| !name.is_empty()) else {
            return Ok(available.last().copied().unwrap_or(Self::Scalar));
        };
        available.iter().copied().find(|kernel| kernel.name() == wanted).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|kernel| kernel.name()).collect();
            CoreError::Kernel { found: wanted, available: names.join(", ") }
        })
    }

    /// Its name, as `SEDAC_KERNEL` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
        }
    }
}
