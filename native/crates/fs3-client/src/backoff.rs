use std::time::Duration;

/// Pauses that double from `first` up to `max`, each cut by a random half so that clients do not march in step.
pub(crate) struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { next: first, max }
    }

    /// The next pause.
    pub fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        pause.mul_f64(0.5 + fs3_rt::random_below(1 << 20) as f64 / f64::from(1 << 21))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(50));
        for limit in [10, 20, 40, 50, 50] {
            let pause = backoff.next().as_millis();
            assert!((limit / 2..=limit).contains(&pause), "{pause} of {limit}");
        }
    }
}
