# Floating-point numbers in nested arrays.
use strict;
use warnings;

my $size = 100;
my (@a, @b, @c);
for my $i (0 .. $size - 1) {
    for my $j (0 .. $size - 1) { $a[$i][$j] = 1 / ($i + $j + 1); $b[$i][$j] = sqrt($i * $j) - $i; }
}
for my $i (0 .. $size - 1) {
    for my $j (0 .. $size - 1) { $c[$i][$j] += $a[$i][$_] * $b[$_][$j] for 0 .. $size - 1; }
}
printf "%.15g\n", $c[$_][$size - 1 - $_] for 0, 7, 50, 99;
