# Makes a text, counts its words, rewrites it by patterns, sorts and formats.
use strict;
use warnings;

my $seed = 7;
sub number { $seed = ($seed * 1103515245 + 12345) & 0x7fffffff; return ($seed >> 8) % $_[0] }

my @syllables = qw(ka to mi re sol fa la ti do su ne vo);
my $text = join ' ', map { join '', map { $syllables[number(12)] } 1 .. 1 + number(4) } 1 .. 60000;
my %count;
$count{$_}++ for split / /, $text;
my @order = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
printf "%-12s %6d\n", $_, $count{$_} for @order[0 .. 9];

(my $changed = $text) =~ s/\b(\w\w)(\w*?)(\w\w)\b/\u$3$2$1/g;
my $doubled = () = $changed =~ /(\w\w)\1/g;
$changed =~ tr/aeiou/eioua/;
my $sum = 0;
$sum = ($sum * 33 + ord) % 4294967291 for split //, $changed;
print "$doubled doubled, checksum $sum, ", length $changed, " characters\n";

my @records = map { sprintf '%05d|%s|%.3f', number(99999), $order[number(scalar @order)], number(1e6) / 997 } 1 .. 20000;
my %by;
for (sort @records) {
    my ($id, $name, $value) = split /\|/;
    push @{ $by{substr $name, 0, 2} }, [$id, $value];
}
for my $key (sort keys %by) {
    my $total = 0;
    $total += $_->[1] for @{ $by{$key} };
    printf "%s %d %.3f %s\n", $key, scalar @{ $by{$key} }, $total, $by{$key}[-1][0];
}
