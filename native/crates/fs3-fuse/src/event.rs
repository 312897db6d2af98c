use tokio::sync::Semaphore;

/// Something that happens once; any number of tasks may wait for it.
pub(crate) struct Event(Semaphore);

impl Event {
    pub fn new() -> Self {
        Self(Semaphore::new(0))
    }

    /// It has happened.
    pub fn set(&self) {
        self.0.close();
    }

    /// Returns once it has happened.
    pub async fn wait(&self) {
        // No permit is ever added: acquiring ends only by the close.
        let _ = self.0.acquire().await;
    }
}
