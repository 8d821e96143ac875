//! Conversion between days since 1970 and dates of the Gregorian calendar.

/// Returns the days from 1 January 1970 to a day of the Gregorian calendar.
///
/// The computation uses years that begin in March. A leap day is then the last day of its year, and the lengths of the
/// months follow a linear formula (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
pub(super) fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    // 1 March of the year 0 is 719,468 days before 1970.
    year * 365 + leap_days + of_year - 719_468
}

/// Returns the year, month and day that are `days` after 1 January 1970. This is the inverse of [`days`].
pub(super) fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year_of_era;
    match month {
        0..10 => (year, month + 3, day),
        _ => (year + 1, month - 9, day),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_is_its_own_inverse_for_ten_thousand_years() {
        let mut last = civil(-719_528);
        assert_eq!(last, (0, 1, 1));
        for day in -719_527..2_932_897 {
            let date = civil(day);
            assert_eq!(days(date.0, date.1, date.2), day);
            assert!(date > last, "{date:?} after {last:?}");
            last = date;
        }
        assert_eq!(last, (9999, 12, 31));
    }
}
