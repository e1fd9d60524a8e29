use super::super::float::Float;
use super::super::kernel::{Kernel, NAMES};
use super::super::proof::{self, products_hold};

#[test]
fn a_name_gives_its_kernel_or_says_why_not_and_what_there_is() {
    for name in NAMES {
        match Kernel::named(name.to_owned()) {
            Ok(kernel) => assert_eq!(kernel.name(), name),
            Err(error) => {
                eprintln!("skipped: {name} cannot run here");
                let text = error.to_string();
                assert!(text.contains(name) && text.contains("this processor cannot run"));
                assert!(Kernel::available().iter().all(|kernel| text.contains(kernel.name())));
            }
        }
    }
    assert!(Kernel::named("scalar".to_owned()).is_ok());
    let unknown = Kernel::named("mmx".to_owned()).unwrap_err().to_string();
    assert!(unknown.contains("\"mmx\", which is not known") && unknown.contains("scalar"));
}

#[test]
fn every_kernel_that_can_be_had_has_proved_itself() {
    assert!(Kernel::available().iter().all(|&kernel| proof::holds(kernel)));
}

#[test]
fn a_kernel_that_is_wrong_or_minds_its_company_fails_the_proof() {
    for float in super::FLOATS {
        let right = |tokens: &[&[f32]], matrix: &super::Matrix| -> Vec<f32> {
            let wide = |row: usize, column: usize| -> f32 {
                // SAFETY: row and column lie within the matrix.
                unsafe {
                    match float {
                        Float::F32 => *matrix.row::<f32>(row).add(column),
                        Float::Bf16 => {
                            f32::from_bits(u32::from(*matrix.row::<u16>(row).add(column)) << 16)
                        }
                        Float::F16 => (*matrix.row::<half::f16>(row).add(column)).to_f32(),
                    }
                }
            };
            let one = |token: &[f32], row: usize| -> f32 {
                token.iter().enumerate().map(|(c, x)| x * wide(row, c)).sum()
            };
            let rows = || 0..matrix.rows();
            tokens.iter().flat_map(|token| rows().map(|row| one(token, row))).collect()
        };
        assert!(products_hold(float, 1e-4, |matrix, tokens| right(tokens, matrix)));
        assert!(!products_hold(float, 1e-4, |matrix, tokens| {
            let mut found = right(tokens, matrix);
            found[3] += 1e-3;
            found
        }));
        assert!(!products_hold(float, 1e-4, |matrix, tokens| {
            let mut found = right(tokens, matrix);
            // One bit, and only where there are four tokens.
            let last = found.len() - 1;
            let turn = u32::from(tokens.len() == 4);
            found[last] = f32::from_bits(found[last].to_bits() ^ turn);
            found
        }));
        assert!(!products_hold(float, 1e-4, |_, tokens| vec![f32::NAN; 7 * tokens.len()]));
    }
}
