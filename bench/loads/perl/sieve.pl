# Bits of a long string.
use strict;
use warnings;

my ($limit, $bits, $count) = (1000000, "", 0);
for my $i (2 .. $limit) {
    next if vec($bits, $i, 1);
    $count++;
    for (my $j = $i * $i; $j <= $limit; $j += $i) { vec($bits, $j, 1) = 1 }
}
print "$count primes, ", unpack("%32b*", $bits), " others\n";
