//! Figures as JSON. Times are in nanoseconds.

use serde_json::{Value, json};

use crate::contest::Unit;
use crate::measure::{Measured, Times};
use crate::verdict::By;
use crate::{profile, table};

pub(crate) fn of(figures: &[Measured], rounds: u32) -> Value {
    json!({
        "profile": profile::build(),
        "processor": profile::processor(),
        "peers": profile::peers(),
        "rounds": rounds,
        "figures": figures.iter().map(figure).collect::<Vec<_>>(),
    })
}

fn figure(figure: &Measured) -> Value {
    let unit = match figure.unit {
        Unit::Time => "ns",
        Unit::Bytes => "bytes",
    };
    json!({
        "number": figure.number,
        "what": figure.what,
        "unit": unit,
        "target": table::target(figure),
        "met_by_medians": figure.met(By::Median),
        "met_by_minima": figure.met(By::Min),
        "contestants": figure.times.iter().map(contestant).collect::<Vec<_>>(),
    })
}

fn contestant(times: &Times) -> Value {
    json!({
        "name": times.name,
        "role": format!("{:?}", times.role).to_lowercase(),
        "min": times.min,
        "median": times.median,
    })
}
