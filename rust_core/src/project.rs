//! Products of a few rows with a tall, narrow matrix: the only hot loop of a checkpoint.
//!
//! Each sum runs over the width in one fixed order, whatever the tile it is computed in, so a
//! row's result does not depend on how many rows share the call.

/// Outputs per panel: two AVX2 registers, four of NEON or SSE.
pub(crate) const LANES: usize = 16;

/// One panel entry: what `LANES` outputs take from one input.
pub(crate) type Lanes = [f32; LANES];

/// Rows that a tile shares each weight between.
pub(crate) const TILE_ROWS: usize = 4;
const TILE_PANELS: usize = 4;

/// Which instructions the sums use. Found once, at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// What the target guarantees (SSE2, NEON, ...).
    Portable,
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2Fma,
}

impl Kernel {
    /// The fastest kernel of this processor.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Self::Avx2Fma;
        }
        Self::Portable
    }

    /// A name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Fma => "avx2+fma",
            Self::Portable if cfg!(target_arch = "aarch64") => "neon",
            Self::Portable => "portable",
        }
    }
}

/// A matrix `[outputs, width]` repacked so that one load serves `LANES` outputs.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    /// `[panel][input]`, outputs padded with zeros to a whole number of panels.
    entries: Vec<Lanes>,
    width: usize,
    count: usize,
}

impl Panels {
    /// Packs a row-major matrix. `matrix.len()` must be `outputs * width`, `width` at least 1.
    pub(crate) fn pack(matrix: &[f32], width: usize) -> Self {
        let outputs = matrix.len() / width;
        let count = outputs.div_ceil(LANES);
        let mut entries = vec![[0.0; LANES]; count * width];
        for (output, row) in matrix.chunks_exact(width).enumerate() {
            let panel = &mut entries[output / LANES * width..][..width];
            for (entry, &value) in panel.iter_mut().zip(row) {
                entry[output % LANES] = value;
            }
        }
        Self { entries, width, count }
    }

    /// Panels, each of `LANES` outputs.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    #[inline(always)]
    fn panel(&self, index: usize) -> &[Lanes] {
        &self.entries[index * self.width..][..self.width]
    }

    /// Writes the products of `R` rows of `width` inputs into `sums`, `[R][count]`.
    #[inline]
    pub(crate) fn project<const R: usize>(
        &self,
        kernel: Kernel,
        rows: [&[f32]; R],
        sums: &mut [Lanes],
    ) {
        match kernel {
            // SAFETY: `Kernel::Avx2Fma` is made by `Kernel::detect` alone, which has asked the
            // processor for both features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2Fma => unsafe { self.project_avx2(rows, sums) },
            Kernel::Portable if cfg!(target_arch = "aarch64") => {
                self.project_with::<R, true>(rows, sums);
            }
            Kernel::Portable => self.project_with::<R, false>(rows, sums),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn project_avx2<const R: usize>(&self, rows: [&[f32]; R], sums: &mut [Lanes]) {
        self.project_with::<R, true>(rows, sums);
    }

    #[inline(always)]
    fn project_with<const R: usize, const FUSED: bool>(
        &self,
        rows: [&[f32]; R],
        sums: &mut [Lanes],
    ) {
        let mut first = 0;
        // One row alone needs several panels at a time to keep the multipliers busy.
        if R == 1 {
            while first + TILE_PANELS <= self.count {
                self.tile::<R, TILE_PANELS, FUSED>(rows, first, sums);
                first += TILE_PANELS;
            }
        }
        while first < self.count {
            self.tile::<R, 1, FUSED>(rows, first, sums);
            first += 1;
        }
    }

    #[inline(always)]
    fn tile<const R: usize, const P: usize, const FUSED: bool>(
        &self,
        rows: [&[f32]; R],
        first: usize,
        sums: &mut [Lanes],
    ) {
        let rows: [&[f32]; R] = std::array::from_fn(|r| &rows[r][..self.width]);
        let panels: [&[Lanes]; P] = std::array::from_fn(|p| self.panel(first + p));
        let mut totals = [[[0.0_f32; LANES]; P]; R];
        for input in 0..self.width {
            for p in 0..P {
                let weights = &panels[p][input];
                for r in 0..R {
                    let value = rows[r][input];
                    for lane in 0..LANES {
                        let total = &mut totals[r][p][lane];
                        *total = if FUSED {
                            value.mul_add(weights[lane], *total)
                        } else {
                            value * weights[lane] + *total
                        };
                    }
                }
            }
        }
        for (r, totals) in totals.iter().enumerate() {
            sums[r * self.count + first..][..P].copy_from_slice(totals);
        }
    }
}
