//! Work items on all cores: each is deterministic for itself, and results come back in the order of
//! the items.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `work` on each item, on `jobs` threads. A panic is the item's error, and ends nobody else.
pub fn each<T: Sync, R: Send>(
    jobs: usize,
    items: &[T],
    work: impl Fn(&T) -> R + Sync,
) -> Vec<Result<R, String>> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<_>> = Mutex::new((0..items.len()).map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while let Some((index, item)) = take(&next, items) {
                    let result =
                        catch_unwind(AssertUnwindSafe(|| work(item))).map_err(|p| message(&*p));
                    results.lock().expect("no panic under it")[index] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().expect("no panic under it");
    results
        .into_iter()
        .map(|result| result.expect("every item was taken"))
        .collect()
}

fn take<'t, T>(next: &AtomicUsize, items: &'t [T]) -> Option<(usize, &'t T)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    items.get(index).map(|item| (index, item))
}

/// What a panic said.
pub fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results keep their places, and a panic is the result of its own item.
    #[test]
    fn results_in_order() {
        let items: Vec<u32> = (0..100).collect();
        let results = each(3, &items, |n| {
            assert!(*n != 50, "fifty");
            n * 2
        });
        for (n, result) in (0..).zip(results) {
            let want = if n == 50 {
                Err("fifty".to_string())
            } else {
                Ok(n * 2)
            };
            assert_eq!(result, want);
        }
    }
}
