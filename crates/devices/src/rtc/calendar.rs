//! Dates and times of day, and how the clock chip writes them (MC146818A data sheet, "Time, calendar, and alarm
//! locations").

/// Register B: binary instead of BCD.
pub const BINARY: u8 = 0x04;
/// Register B: hours from 0 to 23 instead of 1 to 12 with PM.
pub const HOURS_24: u8 = 0x02;
/// In 12-hour mode: afternoon.
const PM: u8 = 0x80;

/// A moment, in UTC or whatever the guest holds the clock to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    /// 1 (Sunday) to 7.
    pub weekday: u8,
    pub day: u8,
    pub month: u8,
    pub year: i64,
}

impl DateTime {
    /// From seconds since 1970. Beyond the years that the chip can tell (0 to 9999) the year is cut off.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        let (year, month, day) = civil_from_days(days);
        Self {
            second: (rest % 60) as u8,
            minute: (rest / 60 % 60) as u8,
            hour: (rest / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day,
            month,
            year: year.rem_euclid(10000),
        }
    }

    /// To seconds since 1970; fields out of range count as the nearest that is not.
    pub fn to_unix(self) -> i64 {
        let days = days_from_civil(self.year.clamp(0, 9999), self.month.clamp(1, 12), self.day.clamp(1, 31));
        let (h, m, s) = (self.hour.min(23), self.minute.min(59), self.second.min(59));
        days * 86400 + i64::from(h) * 3600 + i64::from(m) * 60 + i64::from(s)
    }
}

/// A number as a register holds it in the mode of register B.
pub fn encode(value: u8, mode: u8) -> u8 {
    if mode & BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
}

/// The number that a register holds.
pub fn decode(raw: u8, mode: u8) -> u8 {
    if mode & BINARY != 0 { raw } else { (raw >> 4) * 10 + (raw & 0xf) }
}

/// The hour (0 to 23) as a register holds it.
pub fn encode_hour(hour: u8, mode: u8) -> u8 {
    if mode & HOURS_24 != 0 {
        return encode(hour, mode);
    }
    let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
    encode(twelve, mode) | if hour >= 12 { PM } else { 0 }
}

/// The hour that a register holds; not checked to be one.
pub fn decode_hour(raw: u8, mode: u8) -> u8 {
    if mode & HOURS_24 != 0 {
        return decode(raw, mode);
    }
    decode(raw & !PM, mode) % 12 + if raw & PM != 0 { 12 } else { 0 }
}

/// Days since 1970 to year, month and day of the Gregorian calendar (Hinnant, "chrono-compatible low-level date
/// algorithms").
fn civil_from_days(days: i64) -> (i64, u8, u8) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let doe = shifted.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month as u8, day as u8)
}

fn days_from_civil(year: i64, month: u8, day: u8) -> i64 {
    let (month, day) = (i64::from(month), i64::from(day));
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let yoe = year.rem_euclid(400);
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// When the clock rings: seconds, minutes and hours, `None` for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm(pub [Option<u8>; 3]);

impl Alarm {
    /// The first moment after `after` that fits, if any does.
    pub fn next(self, after: i64) -> Option<i64> {
        let [second, minute, hour] = self.0;
        let wait =
            |now: i64, want: Option<u8>, of: i64| want.map_or(0, |w| (i64::from(w) - now).rem_euclid(of));
        if second.is_some_and(|s| s > 59) || minute.is_some_and(|m| m > 59) || hour.is_some_and(|h| h > 23) {
            return None;
        }
        let mut at = after.checked_add(1)?;
        // The coarsest unit that does not fit moves on to its start; each goes round at most once more.
        for _ in 0..8 {
            let hours = wait(at.div_euclid(3600).rem_euclid(24), hour, 24);
            let minutes = wait(at.div_euclid(60).rem_euclid(60), minute, 60);
            let seconds = wait(at.rem_euclid(60), second, 60);
            at = if hours != 0 {
                at.div_euclid(3600).checked_add(hours)?.checked_mul(3600)?
            } else if minutes != 0 {
                at.div_euclid(60).checked_add(minutes)?.checked_mul(60)?
            } else if seconds != 0 {
                at.checked_add(seconds)?
            } else {
                return Some(at);
            };
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_go_both_ways() {
        let t = DateTime::from_unix(1_709_251_199);
        assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second), (2024, 2, 29, 23, 59, 59));
        assert_eq!(t.weekday, 5);
        for seconds in [0, 951_782_400, 4_102_444_799, 253_402_300_799, -1, -62_000_000_000] {
            assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }
        for odd in [i64::MIN / 2, i64::MAX / 2] {
            let _ = DateTime::from_unix(odd).to_unix();
        }
    }

    #[test]
    fn hours_in_all_modes() {
        for mode in [0, BINARY, HOURS_24, BINARY | HOURS_24] {
            for hour in 0..24 {
                assert_eq!(decode_hour(encode_hour(hour, mode), mode), hour);
            }
        }
        assert_eq!((encode_hour(0, 0), encode_hour(12, 0), encode_hour(23, 0)), (0x12, 0x92, 0x91));
    }

    #[test]
    fn alarms_are_those_of_a_plain_search() {
        let fits = |a: Alarm, t: i64| {
            let d = DateTime::from_unix(t);
            a.0.iter().zip([d.second, d.minute, d.hour]).all(|(w, is)| w.is_none_or(|w| w == is))
        };
        for after in [0, 59, 3599, 86_399, 45_296, 50_000] {
            for s in [None, Some(0), Some(17), Some(59)] {
                for m in [None, Some(0), Some(30), Some(59)] {
                    for h in [None, Some(0), Some(12), Some(23)] {
                        let alarm = Alarm([s, m, h]);
                        let plain = (after + 1..=after + 86_400).find(|&t| fits(alarm, t));
                        assert_eq!(alarm.next(after), plain, "{alarm:?} after {after}");
                    }
                }
            }
        }
        assert_eq!(Alarm([Some(60), None, None]).next(0), None);
    }
}
