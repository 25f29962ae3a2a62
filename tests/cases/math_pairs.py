"""Answers beside references, with what a careful person would say of them: about as many wrong ones as right ones.

`refused`: the answer can be read in two ways, or says nothing, and earns nothing. A wrong answer may be refused as
well; a right one must be right.
"""

from __future__ import annotations

R, W, X = "right", "wrong", "refused"

Pair = tuple[str, str, str]

BOXED: dict[str, list[Pair]] = {
    "integers": [
        ("72", "72", R), ("072", "72", R), ("+72", "72", R), ("72.", "72", R), ("71", "72", W), ("-72", "72", W),
        ("720", "72", W), ("27", "72", W), ("72 72", "72", X), ("", "72", X), ("0", "-0", R),
        ("123456789012345678901234567890", "123456789012345678901234567891", W),
    ],
    "thousands": [
        ("1,234", "1234", R), ("1234", "1,234", R), ("1{,}234", "1234", R), (r"1\,234", "1234", R),
        (r"1,\!234", "1234", R), ("1 234 567", "1234567", R), (r"1{,}234{,}567.5", "1234567.5", R),
        ("10,000", "1,000", W), ("1,234", "1.234", W), ("2,300", "2, 300", W), ("2, 300", "2,300", W),
        ("12,34", "1234", W), ("1,2345", "12345", W), ("12,345,6", "123456", X), (r"\$1,000,000", "1000000", R),
        ("1,000,00", "100000", X), ("0,123", "123", X), ("2,300", "2300.0", R),
    ],
    "decimals": [
        ("0.5", ".5", R), ("0.50", "1/2", R), ("2.0", "2", R), ("0.33", "1/3", W), ("0.333333333333", "1/3", W),
        ("3.14", r"\pi", W), ("3.14159265358979", r"\pi", W), (r"0.\overline{3}", "1/3", R),
        (r"0.1\overline{6}", r"\frac{1}{6}", R), (r"0.\overline{142857}", "1/7", R), (r"0.\overline{3}", "0.3", W),
        (r"0.\overline{12}", "0.12", W), ("0.333...", "1/3", X), (r"0.\overline{9}", "1", R), ("1.2.3", "1.23", X),
        ("0.1(6)", "1/6", X), ("18.90", "18.9", R), ("18.09", "18.9", W), (r"\approx 3.14", "3.14", R),
    ],
    "tiny and huge": [
        ("2^{-98}", "2^{-99}", W), (r"\frac{1}{2^{98}}", "2^{-98}", R), ("10^{-30}", "0", W), ("10^{-30}", "10^{-31}", W),
        (r"1+10^{-200}", "1", W), (r"\pi \cdot 10^{-98}", r"\pi \cdot 10^{-99}", W), (r"1+10^{-200}\sqrt{2}", "1", W),
        (r"\sqrt{10^{40}+1}", "10^{20}", W), ("2^{64}", "18446744073709551616", R), ("2^{64}", "18446744073709551615", W),
        ("2^{100000}", "4^{50000}", R), ("2^{100000}", "2^{100001}", W), ("9^{9^{9^{9}}}", "5", W), ("0.0000001", "0", W),
    ],
    "percents": [
        ("50%", "50", R), (r"50\%", "1/2", R), ("0.5", r"50\%", R), ("50", r"50\%", R), ("5%", "50%", W), ("50%", "5", W),
        ("0.5%", "0.5", R), (r"50\%", r"0.5\%", W), ("50 percent", "50%", R), (r"33\frac{1}{3}\%", r"\frac{1}{3}", R),
        (r"33\%", "1/3", W), ("25+25", "50%", R),
    ],
    "fractions": [
        (r"\frac{1}{2}", "1/2", R), (r"\dfrac{2}{4}", "0.5", R), (r"\tfrac12", r"\frac{1}{2}", R), (r"\frac12", "0.5", R),
        (r"\frac1{2}", "0.5", R), (r"\frac{1}2", "0.5", R), ("-1/2", r"-\frac{1}{2}", R), (r"\frac{-1}{2}", "-0.5", R),
        (r"\frac{1}{-2}", "-1/2", R), ("2/1", "1/2", W), (r"\frac{1}{3}", "1/2", W), (r"\frac{2}{1}", r"\frac{1}{2}", W),
        ("1/0", "0", X), (r"\frac{\frac{1}{2}}{3}", "1/6", R), (r"\frac{1}{\frac{2}{3}}", "1/6", W), ("6/4", "3/2", R),
        (r"\frac{10}{4}", r"\frac{5}{2}", R), (r"\frac{3}{4}x", r"\frac{3x}{4}", R), ("1/2x", r"\frac{1}{2x}", X),
        ("-1/2", "1/2", W), ("⅔", r"\frac{2}{3}", R), ("⅔", r"\frac{3}{2}", W),
    ],
    "mixed numbers": [
        ("1 1/2", "3/2", R), ("1.5", "1 1/2", R), ("11/2", "1 1/2", W), ("1 1/2", "11/2", W), (r"2\frac{1}{2}", "5/2", R),
        (r"2\frac{1}{2}", "1", W), ("-1 1/2", "-3/2", R), ("-1 1/2", "-1/2", W), ("1½", "1.5", R), ("1½", "0.5", W),
        (r"3\,\frac{1}{4}", "13/4", R), ("31/4", "3 1/4", W), (r"2 \frac{5}{3}", "11/3", X), (r"2 \cdot \frac{1}{2}", "1", R),
        (r"2 \cdot \frac{1}{2}", "5/2", W), ("1-1/2", "1/2", R), ("1-1/2", "3/2", W), ("1 and 1/2", "3/2", R),
        ("2 and a half", "2.5", R), (r"1\ \tfrac12", "1.5", R), ("1 12", "1/2", X),
    ],
    "negatives": [
        ("-5", "−5", R), ("- 5", "-5", R), ("–5", "-5", R), ("5", "-5", W), ("-5", "5", W), ("(-5)", "-5", R),
        ("-(-5)", "5", R), ("negative 5", "-5", R), ("--5", "5", X), ("minus 5", "5", W),
    ],
    "scientific": [
        (r"3 \times 10^8", "300000000", R), ("3×10^8", "3e8", R), ("3e8", "300,000,000", R), ("3E+8", r"3\cdot10^{8}", R),
        (r"3 \times 10^{-4}", "0.0003", R), ("3×10⁸", "3e8", R), (r"3 \times 10^8", "3e9", W), ("3e-4", "3e4", W),
        (r"3 \times 10^{-8}", r"3 \times 10^8", W), ("310^8", r"3 \times 10^8", W), (r"30 \times 10^7", r"3 \times 10^8", R),
    ],
    "currency": [
        ("$18", "18", R), (r"\$18", "18", R), ("18 dollars", "18", R), ("$18.00", r"\$18", R), ("£18", "18", R),
        ("$18", "£18", W), ("18 cents", "$18", W), ("$18", "18 dollars", R), ("$1.8", "18", W), ("-$5", "-5", R),
        ("$-5", "5", W), (r"\$18\text{ dollars}", "18", R), ("€5", "5 euros", R),
    ],
    "units": [
        (r"5\text{ cm}", "5", R), (r"5 \mathrm{~cm}", "5", R), (r"5\,\mathrm{cm}", "5", R), ("5cm", "5 cm", R),
        ("5 centimeters", "5 cm", R), ("5", r"5\text{ cm}", R), ("5 m", "5 cm", W), (r"5\text{ m}", r"5\text{ cm}", W),
        (r"5\text{ cm}^2", "5 cm²", R), (r"5\text{ cm}^2", r"5\text{ cm}", W), ("5 square feet", r"5\text{ ft}^2", R),
        ("72 apples", "72", R), ("72 apples", "72 oranges", W), ("72 apples", "27", W), ("60 km/h", r"60\text{ km/h}", R),
        ("60 miles per hour", "60 mph", R), ("60 km/h", "60 mph", W), ("5 hours", "5 minutes", W), ("5 kg", "5 g", W),
        (r"10\frac{\text{m}}{\text{s}}", "10 m/s", R), (r"12\pi\text{ cm}^3", r"12\pi", R), ("5 out of 10", "5", X),
        ("5 less than 10", "5", X), ("1 apple", "1 apples", R), ("6 red apples", "6", R), ("5 kilograms", "5 kg", R),
    ],
    "degrees": [
        (r"45^\circ", "45", R), (r"45^{\circ}", "45°", R), ("45°", "45 degrees", R), ("45", r"45^\circ", R),
        (r"45^\circ", r"54^\circ", W), (r"45^\circ", "45 radians", W), (r"\sin 30^\circ", r"\frac{1}{2}", R),
        (r"\cos(60^\circ)", r"\sin(60^\circ)", W), ("20°C", "20", R), ("20°C", "20°F", W),
    ],
    "ordinals": [
        ("5th", "5", R), (r"5^{\text{th}}", "5", R), (r"21^\text{st}", "21", R), ("3rd", "3rd", R), ("4th", "5th", W),
        ("5th", "5^t", W),
    ],
    "magnitudes": [
        ("5 million", "5000000", R), ("5 million", "5", W), ("5", "5 million", W), ("1.5 billion", "1,500,000,000", R),
        (r"5\text{ million}", "5,000,000", R), ("5 million dollars", "$5,000,000", R), ("5 thousand", "5000000", W),
        ("two hundred", "200", R), ("2 hundred", "2", W), ("3 dozen", "36", R), ("3 dozen", "3", W),
        ("twenty-five", "25", R), ("twenty-five", "205", W), ("five", "5", R), ("six", "5", W),
        ("one hundred twenty", "120", R), ("5 million", "5 billion", W), ("2 dozen eggs", "24", R),
    ],
    "roots": [
        (r"\sqrt{2}", "√2", R), ("2√3", r"2\sqrt{3}", R), (r"\sqrt{12}", r"2\sqrt3", R), ("sqrt(8)", r"2\sqrt{2}", R),
        (r"\frac{\sqrt 2}{2}", r"\frac{1}{\sqrt{2}}", R), (r"\sqrt[3]{8}", "2", R), ("∛27", "3", R), (r"\sqrt{3}", r"\sqrt{2}", W),
        (r"\sqrt[3]{4}", r"\sqrt{4}", W), (r"2\sqrt{3}", r"3\sqrt{2}", W), (r"\sqrt{2}", "1.41421356", W),
        (r"\sqrt{4}", "-2", W), (r"\sqrt{16}", "4", R), ("√12", r"2\sqrt{3}", R), (r"\sqrt{2+3}", r"\sqrt{2}+3", W),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", R), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}", W),
    ],
    "powers": [
        ("2^10", "1024", R), ("2**10", "1024", R), ("2^{10}", "20", W), ("x²", "x^2", R), ("x^2", "2x", W), ("x^3", "x²", W),
        ("2^{-1}", "1/2", R), ("2^-1", "0.5", R), ("2^{3^2}", "512", R), ("2^{3^2}", "64", W), ("(-2)^2", "4", R),
        ("-2^2", "4", W), ("8^{1/3}", "2", R), (r"4^{\frac12}", "2", R), ("e^{2}", "e^2", R), ("e^{2}", "2e", W), ("3!", "6", R),
        ("5!", "120", R), ("5!", "5", W), (r"\binom{5}{2}", "10", R), (r"\binom{5}{2}", r"\binom{5}{3}", R),
        (r"\binom{5}{2}", "20", W),
    ],
    "constants": [
        (r"2\pi", "2π", R), (r"2\pi", r"\pi^2", W), ("pi/2", r"\frac{\pi}{2}", R), (r"\frac{\pi}{2}", r"\frac{2}{\pi}", W), ("e", "2.718281828", W),
        (r"2\pi", "6.28", W), (r"\ln(e^3)", "3", R), (r"\log_2 8", "3", R), (r"\log_2 8", "4", W), (r"\log 8", r"3\log 2", R),
        (r"\log 100", r"\ln 100", W), (r"\sin(\pi/6)", "1/2", R), ("sin(pi/6)", "1/2", R), (r"\sin\pi/6", "1/2", X),
        (r"e^{i\pi}", "-1", R), (r"\arctan 1", r"\frac{\pi}{4}", R),
    ],
    "infinity": [
        ("∞", r"\infty", R), (r"+\infty", r"\infty", R), (r"-\infty", r"\infty", W), ("infinity", r"\infty", R), ("5", r"\infty", W),
        (r"\infty", "9999999", W), ("negative infinity", r"-\infty", R),
    ],
    "intervals": [
        ("(1, 2)", "(1,2)", R), ("[1,2]", "(1,2)", W), ("[1,2)", "(1,2]", W), (r"(-\infty, 3]", "(-∞,3]", R), ("(2,1)", "(1,2)", W),
        (r"\left[0, \frac{\pi}{2}\right)", r"[0, \pi/2)", R), (r"x \in (3, 5)", "(3,5)", R), ("(0.5, 1)", r"(\frac12, 1)", R),
        (r"(3,\infty)", r"[3,\infty)", W), (r"(1,2) \cup (3,4)", r"(3,4)\cup(1,2)", R), (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,5)", W),
        (r"(1,2) \cup (3,4)", "(1,4)", W), (r"(1,2]\cup(2,3)", "(1,3)", R), (r"(1,2)\cup(2,3)", "(1,3)", W),
        (r"(-\infty,\infty)", r"\mathbb{R}", R), (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}\setminus\{2\}", R),
        (r"(-\sqrt{2}, \sqrt{2})", r"(-\sqrt2, \sqrt2)", R), ("all real numbers", r"(-\infty,\infty)", R), ("(1,234)", "1234", W),
        ("1,2", "(1,2)", W),
    ],
    "inequalities": [
        ("x>3", r"(3,\infty)", R), (r"(3,\infty)", "x > 3", R), (r"x\geq 3", r"[3,\infty)", R), ("x>3", r"[3,\infty)", W),
        ("x<3", r"(3,\infty)", W), ("3<x", "x>3", R), ("1<x≤5", "(1,5]", R), (r"1 < x \le 5", "[1,5)", W), (r"5 \ge x > 1", "(1,5]", R),
        ("x<-1 or x>1", r"(-\infty,-1)\cup(1,\infty)", R), ("x>1 and x<3", "(1,3)", R), ("x>1 or x<3", "(1,3)", W),
        (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)", R), ("x>3", "y>3", W), ("x>3", "3", W), ("x=3", "x>3", W), ("2x+y>3", "y+2x>3", R),
        ("2x+y>3", "2x+y<3", W), (r"\{x \mid x > 3\}", r"(3,\infty)", R), (r"x \le 3", "x < 3", W),
    ],
    "sets": [
        (r"\{1,2\}", r"\{2, 1\}", R), (r"\{1,2,2\}", r"\{1,2\}", R), (r"\{1,2\}", r"\{1,3\}", W), ("(1,2)", r"\{1,2\}", W), ("1,2", r"\{1,2\}", R),
        ("2, 1", r"\{1,2\}", R), (r"\{1,2\}", "(1,2)", W), (r"\{1\}", r"\{1,2\}", W), (r"\{1,2,3\}", r"\{1,2\}", W), (r"\{100,200\}", r"\{200, 100\}", R),
        (r"\{100,200\}", r"\{100200\}", W), (r"\{\frac12, 1\}", r"\{1, 0.5\}", R), (r"\emptyset", r"\varnothing", R), (r"\{\}", "∅", R),
        (r"\emptyset", "0", W), (r"\{0\}", r"\emptyset", W), (r"\{-\sqrt{2}, \sqrt{2}\}", r"\{\sqrt2, -\sqrt2\}", R), ("[1,2]", r"\{1,2\}", W), (r"\{x, y\}", r"\{y, x\}", R),
    ],
    "tuples": [
        ("(1,2,3)", "(1, 2, 3)", R), ("(1,3,2)", "(1,2,3)", W), ("(3, -4)", "(3,-4)", R), ("(-4, 3)", "(3,-4)", W), (r"\left(\frac12, 3\right)", "(0.5,3)", R),
        (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)", R), (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi)", W), ("(1,2)", "(1,2,3)", W), (r"\langle 1, 2\rangle", "(1,2)", R),
        ("(x, y)", "(y, x)", W), ("(a+b, 2)", "(b+a, 2)", R), ("(1,2),(3,4)", "(1,2), (3,4)", R), ("(1,2),(3,5)", "(1,2), (3,4)", W), ("(3)", "3", R),
    ],
    "lists": [
        ("1, 2", "1,2", R), ("2,1", "1,2", W), ("1,2,3", "1, 2, 3", R), ("1, 2", "1, 2, 3", W), ("1, 2, 3", "1, 2", W), ("1 and 2", "1 or 2", R), ("2 or 1", "1 or 2", R),
        ("1", "1 or 2", W), ("5 or 6", "5", W), ("5, 6", "5", W), ("x = 1 or x = 2", r"\{1,2\}", R), ("x=1, x=2", "x=2, x=1", R), ("x=1, y=2", "y=2, x=1", R),
        ("x=1, y=2", "x=2, y=1", W), (r"\pm 2", "2, -2", R), (r"2, -2", r"\pm 2", R), (r"-2, 2", r"\pm 2", R), (r"\pm 2", "2", W), (r"1 \pm \sqrt{2}", r"\{1-\sqrt2, 1+\sqrt2\}", R),
        (r"1 \pm \sqrt{2}", r"\{1-\sqrt3, 1+\sqrt3\}", W), ("1,000, 2,000", "1000, 2000", R), ("red, blue", "red, blue", R), ("red, blue", "red, green", W),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", R),
        (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", W),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", W),
        (r"\begin{pmatrix}\frac12\\2\end{pmatrix}", r"\begin{pmatrix}0.5\\2\end{pmatrix}", R),
        (r"\begin{pmatrix}-7 \\ 16 \\ 5\end{pmatrix}", r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}", R),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", R),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", W),
        (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", W),
    ],
    "expressions": [
        ("x + 1", "1+x", R), ("x+2", "x+1", W), ("2x", r"2\cdot x", R), ("2x", "x*2", R), ("2ab", "2ba", R), ("(x+1)(x-1)", "x^2-1", R), ("(x+1)^2", "x^2+1", W),
        (r"\frac{x+1}{2}", r"\frac{x}{2}+\frac12", R), (r"\frac{x}{y}", r"\frac{y}{x}", W), ("x", "X", W), ("-x+3", "3-x", R), ("x-3", "3-x", W), ("n(n+1)/2", r"\frac{n^2+n}{2}", R),
        ("x_1 + x_2", "x_2+x_1", R), ("x_1", "x_2", W), (r"\sin^2 x + \cos^2 x", "1", R), (r"\sin 2x", r"2\sin x\cos x", R), (r"\sin 2x", r"2\sin x", W), (r"\sqrt{x^2}", "x", W),
        (r"\sqrt{x^2}", "|x|", R), (r"\alpha + \beta", r"\beta+\alpha", R), (r"\theta", r"\phi", W), ("2^n", "n^2", W), ("2^{n+1}", r"2\cdot 2^n", R), (r"|x-1000|", "1000-x", W), ("0x+5", "5", R),
        (r"\frac{1}{x+1}", r"\frac{1}{x}+1", W), (r"x^{1/3}", r"\sqrt[3]{x}", R), ("a-b-c", "a-(b-c)", W), ("xy", r"x\cdot y", R), (r"e^{x}e^{y}", "e^{x+y}", R), (r"\lfloor x \rfloor", r"\lceil x \rceil", W),
    ],
    "equations": [
        ("x=5", "5", R), ("5", "x=5", R), ("x = 5", "x=5", R), ("x=5", "y=5", W), ("x=6", "5", W), ("5=x", "x=5", R), ("y=2x+1", "2x+1", R), ("y=2x+1", "y=1+2x", R), ("y=2x+1", "y=x+2", W),
        ("y=2x+1", "x=2y+1", W), ("2x+y=3", "y+2x=3", R), ("4x+2y=6", "2x+y=3", R), ("2x+y=4", "2x+y=3", W), ("2x-y+1=0", "y=2x+1", R), ("2x=10", "x=5", W), ("f(x)=x^2", "x^2", R),
        ("2+3=5", "5", R), ("2+2=5", "4", W), ("x=2+3=5", "5", R), (r"x \approx 5", "5", R), (r"\frac{22}{7} \approx 3.14", "22/7", R), (r"\frac{22}{7} \approx 3.14", "3.14", W),
        ("x^2+y^2=25", "x^2+y^2-25=0", R), ("x^2+y^2=25", "x^2+y^2=5", W),
    ],
    "choices": [
        ("B", "B", R), ("(B)", "B", R), ("B", "(B)", R), (r"\text{(B)}", "B", R), (r"\textbf{(B)}\ 12", "B", R), (r"\textbf{(B)}\ 12", "12", R), (r"\textbf{(B)}\ 12", "C", W), (r"\textbf{(B)}\ 12", "13", W),
        ("B. 12", "B", R), ("B)", "B", R), ("Option B", "B", R), ("(b)", "B", R), ("C", "B", W), ("(A)", "(B)", W), ("12", r"\textbf{(B)}\ 12", R), ("13", r"\textbf{(B)}\ 12", W), ("A or B", "B", W), ("AB", "B", W),
        ("A, C", "A, C", R), ("A", "A, C", W),
    ],
    "texts": [
        (r"\text{Evelyn}", "Evelyn", R), ("evelyn", "Evelyn", R), ("Evelyn", r"\text{Evan}", W), ("BAC", "ABC", W), ("HT", "TH", W), (r"\text{was}", r"\text{saw}", W), (r"\text{no}", r"\text{on}", W), ("east", r"\text{East}", R),
        ("east", "west", W), (r"\text{not east}", r"\text{east}", W), ("the circle", "circle", R), ("Monday", "Tuesday", W), ("listen", "silent", W), (r"\mathrm{red}", "red", R), ("red ball", "ball red", W),
    ],
    "yes and no": [
        ("Yes", r"\text{yes}", R), ("No", "Yes", W), ("NO", "no", R), ("True", "true", R), ("False", "True", W), ("Yes, it converges", "yes", R), ("yes or no", "yes", W), ("not true", "true", W), ("1", "True", W),
    ],
    "dates and times": [
        ("3:30 PM", "3:30 p.m.", R), ("15:30", "3:30 PM", R), ("3:30 AM", "3:30 PM", W), ("3:45", "3:30", W), ("5 PM", "5:00 PM", R), ("March 5", "5 March", R), ("March 5, 2020", "2020-03-05", R), ("March 6, 2020", "2020-03-05", W),
        ("May 3", "March 5", W), ("3/5/2020", "5/3/2020", W), ("3:30", "330", W), ("12:00 AM", "12:00 PM", W), ("2020-03-05", "2012", W),
    ],
    "ratios": [
        ("3:4", "6:8", R), ("3:4", "4:3", W), ("1:2:3", "2:4:6", R), ("1:2:3", "1:3:2", W), ("3 : 4", "3:4", R),
    ],
    "bases": [
        ("101_2", "101_{2}", R), ("101_3", "101_2", W), ("2516_7", "2516_8", W), ("110_2", "101_2", W), ("101₂", "101_2", R), ("5", "101_2", W), ("101", "101_2", W), (r"1A_{16}", "1a_{16}", R), ("12_2", "12_3", X), ("25_{10}", "25", R),
        (r"413_{\text{five}}", "413_5", R), ("0101_2", "101_2", R), ("101 base 2", "101_2", R),
    ],
    "complex": [
        ("3+4i", "4i+3", R), ("3-4i", "3+4i", W), ("i^2", "-1", R), (r"\sqrt{-4}", "2i", R), ("(1+i)^2", "2i", R), ("2i", "2", W), (r"\frac{1}{i}", "-i", R), (r"\frac{1}{i}", "i", W), ("1+2i", "2+i", W),
    ],
    "unicode": [
        ("½", "1/2", R), ("√3", r"\sqrt{2}", W), ("x ≤ 3", r"x \leq 3", R), ("2·3", "6", R), ("6÷2", "3", R), ("−3", "-3", R), ("３", "3", R), ("10²", "100", R), ("10²", "102", W), ("a₁", "a_1", R), ("θ", r"\theta", R), ("x⁻¹", "1/x", R), ("x⁻¹", "x", W),
    ],
    "boxes in boxes": [
        (r"\boxed{5}", "5", R), (r"1 + \boxed{2}", "3", R), (r"\boxed{6}", "5", W), (r"\fbox{5}", "5", R),
    ],
}  # fmt: skip
"""What stands in \\boxed{}, the reference, and the verdict; by kind."""

TEXTS: dict[str, list[Pair]] = {
    "hashes": [
        ("2+2=4\n#### 4", "4", R), ("#### 4\n#### 5", "5", R), ("#### 4\n#### 5", "4", W), ("#### $1,000.00", "1000", R), ("####5", "5", R), ("#### 5 apples", "5", R), ("#### -5", "5", W),
        ("#### 5\nand so on 6", "5", R), ("#### \n", "5", X), ("It is 3.\n#### five", "5", R), ("####", "5", X),
    ],
    "phrases": [
        ("Final Answer: The final answer is $73$. I hope it is correct.", "73", R), ("Final Answer: The final answer is $73$. I hope it is correct.", "37", W),
        (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", "0.5", R), ("The answer is 5. No wait, the answer is 6.", "6", R), ("The answer is 5. No wait, the answer is 6.", "5", W),
        ("The answer is 5.", "5", R), ("Answer: 5", "5", R), ("**Answer:** $3.50", "3.5", R), ("answer = 5", "5", R), ("The final answer is: **12**", "12", R), ("Answer:\n\n5", "5", R), ("The answer is:\n$$\n5\n$$", "5", R),
        ("The answer is 5, because 2+3=5.", "5", R), ("The answer is 6, because 5 is odd.", "5", W), ("The answer is 5!", "120", X), ("The answer is 5!", "5", X), ("The answer is $5!$.", "120", R), ("The answer is not 5", "5", W),
        ("The answer is 5 million.", "5", W), ("The answer is $5 million.", "5000000", R), ("So the answer is (B).", "B", R), ("So the answer is (B).", "C", W), ("The answer is 5 or 6.", "6", W), ("The answers are 1 and 2.", "1 and 2", R),
        ("The answer is 5. I hope the answer is correct.", "5", R), ("I do not know", "5", X), ("The answer is", "5", X), ("The answer to the question is 7.", "7", R), ("The answer is 3.5.", "3.5", R), ("The answer is 3.5.", "3", W),
        ("Answer: The answer is 5", "5", R), (r"The answer is \(\sqrt{2}\).", r"\sqrt2", R), ("The answer is 10 meters per second.", "10 m/s", R), ("The answer is 1 1/2 cups.", "1.5", R), ("The answer is 11/2 cups.", "1 1/2", W),
    ],
    "boxes": [
        (r"so \boxed{3} or rather \boxed{\frac{1}{2}}.", "0.5", R), (r"so \boxed{3} or rather \boxed{4}.", "3", W), (r"\boxed{1}, \boxed{2}", "1, 2", R), (r"$\boxed{1}$ and $\boxed{2}$", "1 or 2", R), (r"\boxed{1} or \boxed{2}", "2", W),
        (r"\boxed{12", "12", X), (r"\boxed{3} then \boxed{12", "3", X), (r"\boxed{\text{yes}}", "yes", R), (r"The answer is \boxed{7}. The answer is 8.", "7", R), (r"\boxed{\{1, 2\}}", r"\{2,1\}", R), (r"\boxed{}", "5", X),
        (r"$\boxed{5}$. That is all, 6.", "5", R), ("\\boxed{5}\n\n\\boxed{5}", "5", R), (r"\boxed{x = \boxed{5}}", "5", R),
    ],
}  # fmt: skip
"""Whole completions, the reference, and the verdict; by what marks the answer."""

UNREADABLE_REFERENCES = (
    "12,345,6", "1/2x", r"\sin\pi/6", "0.1(6)", r"2\frac{5}{3}", "1/0", "12_2", "1 2", r"\int_0^1 x\,dx", "0.333...", "==+", "(1,2", r"\frac{1}", "5 out of 10", r"\sqrt12",
)  # fmt: skip
"""Two readings, or none: rows with these are refused before training."""
