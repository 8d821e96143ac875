//! Formatting of the dirtier's command line on the host, where `String` is available.

use crate::dirtier::{Config, ConfigError};

impl Config {
    /// Returns the kernel command line for this configuration.
    ///
    /// # Errors
    /// Returns [`ConfigError`] for the first value that the guest would refuse on any machine.
    pub fn command_line(&self) -> Result<String, ConfigError<'static>> {
        self.check()?;
        Ok(self.to_string())
    }
}
