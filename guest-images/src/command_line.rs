//! The host's half of the command line, which needs `String`.

use crate::dirtier::{Config, ConfigError};

impl Config {
    /// The command line that makes the dirtier do this.
    ///
    /// # Errors
    /// The first value that the guest would refuse whatever the machine.
    pub fn command_line(&self) -> Result<String, ConfigError<'static>> {
        self.check()?;
        Ok(self.to_string())
    }
}
