use crate::WriterRecord;

/// Records kept per chunk whatever their age.
pub const WRITERS_KEPT: usize = 16;
/// Records kept per chunk at most.
pub const WRITERS_MAX: usize = 64;
/// Beyond [`WRITERS_KEPT`] a record goes once it is this old, in milliseconds.
pub const WRITER_AGE_MS_MIN: i64 = 10 * 60 * 1000;

/// Adds `record`, replacing the one of the same client and channel. The oldest records beyond
/// [`WRITERS_KEPT`] go when they are [`WRITER_AGE_MS_MIN`] older than `record`, or beyond [`WRITERS_MAX`].
/// Records are kept oldest first.
pub fn remember(records: &mut Vec<WriterRecord>, record: WriterRecord) {
    records.retain(|r| (r.client, r.channel) != (record.client, record.channel));
    records.push(record);
    while records.len() > WRITERS_MAX
        || (records.len() > WRITERS_KEPT && record.time_ms - records[0].time_ms >= WRITER_AGE_MS_MIN)
    {
        records.remove(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(channel: u32, sequence: u64, time_ms: i64) -> WriterRecord {
        WriterRecord { channel, sequence, time_ms, ..Default::default() }
    }

    #[test]
    fn one_record_per_channel_is_kept() {
        let mut records = vec![];
        remember(&mut records, record(1, 1, 0));
        remember(&mut records, record(2, 9, 1));
        remember(&mut records, record(1, 2, 2));
        assert_eq!(records, vec![record(2, 9, 1), record(1, 2, 2)]);
    }

    #[test]
    fn young_records_stay_up_to_the_hard_limit_and_old_ones_down_to_the_soft_one() {
        let mut records = vec![];
        for channel in 0..100 {
            remember(&mut records, record(channel, 1, i64::from(channel)));
        }
        assert_eq!(records.len(), WRITERS_MAX);
        remember(&mut records, record(1000, 1, WRITER_AGE_MS_MIN + 1000));
        assert_eq!(records.len(), WRITERS_KEPT);
        assert_eq!(records.last().unwrap().channel, 1000);
    }
}
